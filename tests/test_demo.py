"""`python -m fewbit_hooks demo`, in quick forms, and what it fetches, from a pip that is not one."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fewbit_hooks as fewbit
from fewbit_hooks.__main__ import main
from fewbit_hooks._demo import _fetch, _reviews, _runs, _summary, _training
from fewbit_hooks._demo._fetch import Package, cache_folder, fetch, unpack_folder
from fewbit_hooks._demo._memory import PeakMemory
from fewbit_hooks._demo._task import Data, Recipe, Settings, Task, load
from fewbit_hooks._demo._training import Result

MIB = 2**20


def test_the_whole_demo_quickly(tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    arguments = ["demo", "--quick", "--bits", "2", "--output", str(picture)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for each other on busy cores take minutes
    command = [sys.executable, "-m", "fewbit_hooks", *arguments]
    done = subprocess.run(command, env=one_thread, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = {cells[0]: cells[1:] for line in done.stdout.splitlines() if len(cells := _cells(line)) == 3}
    assert rows["first loss"][0] == rows["first loss"][1]
    assert rows["original"] == ["49.0 MiB", "49.0 MiB"]  # GELU's inputs, and as much of dropout's noise
    assert rows["stored"] == ["0 B", "2.3 MiB"]
    assert rows["freed"] == ["0 B", "49.0 MiB"]
    assert {"test accuracy", "peak process memory", "time a step, median", "gradient error"} <= rows.keys()
    assert "warning" not in done.stderr.lower()


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│ ").split("│")]


class TinyModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


@pytest.fixture
def tiny() -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=generator)
    data = Data(x, (x.sum(1) > 0).long())
    return Task("tiny", TinyModel, data[:320], data[320:], Recipe(3, 32, 1e-2, 0.0))


def test_runs_start_alike_and_few_bits_learn_as_well(tiny: Task) -> None:
    stock, three = (_training.run(tiny, bits, Settings()) for bits in (None, 3))
    assert stock.losses[0] == three.losses[0]  # the forward is exact
    assert stock.losses != three.losses  # the gradient is not
    assert len(stock.losses) == len(three.losses) == 30
    assert min(stock.accuracy, three.accuracy) > 0.9
    assert stock.original_bytes == stock.held_bytes == three.original_bytes == three.freed_bytes == 32 * 64 * 4
    assert three.stored_bytes == three.held_bytes == 32 * 64 // 8  # beside the output, which the next layer keeps
    assert (stock.relative_error, stock.cosine) == (0.0, 1.0)
    assert 0 < three.relative_error < 0.2
    assert three.cosine > 0.98


def test_a_run_can_be_repeated(tiny: Task) -> None:
    told: list[float] = []
    settings = Settings(seed=3, epochs=1)
    first, second = (_training.run(tiny, 2, settings, told.append) for _ in range(2))
    assert first.losses == second.losses
    assert told == first.losses + second.losses
    assert first.losses != _training.run(tiny, 2, replace(settings, seed=4)).losses


def test_batches_are_whole_and_every_example_comes_once_an_epoch(tiny: Task) -> None:
    batches = list(tiny.step_batches(Settings(epochs=2)))
    assert [len(batch) for batch in batches] == [32] * 20
    rows = torch.cat([batch.x for batch in batches[:10]])
    assert torch.equal(rows.sum(0).round(decimals=3), tiny.train.x.sum(0).round(decimals=3))
    assert not torch.equal(batches[0].x, batches[10].x)


def test_the_split_of_the_digits_does_not_depend_on_the_seed() -> None:
    one, other = (load(Settings(seed=seed)) for seed in (0, 1))
    assert torch.equal(one.test.x, other.test.x)
    assert len(one.train) + len(one.test) == 1797


def test_a_run_that_fails_is_one_error(monkeypatch) -> None:
    with pytest.raises(fewbit.FewbitError, match=r"the run with bits=3 failed:\n(.*\n)*.*'nowhere'|nowhere"):
        _runs._in_a_process(Settings(device="nowhere"), 3, lambda loss: None)


def test_a_missing_extra_is_named_with_the_remedy(monkeypatch, capsys) -> None:
    found = _runs.importlib.util.find_spec
    monkeypatch.setattr(_runs.importlib.util, "find_spec", lambda name: None if name == "rich" else found(name))
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == 'fewbit: the demo needs rich: pip install "fewbit-hooks[demo]"\n'


def test_the_peak_sees_what_is_allocated_and_given_back() -> None:
    with PeakMemory("cpu") as small:
        torch.ones(MIB // 4).sum()
        torch.linalg.norm(torch.ones(256, 256))
    with PeakMemory("cpu") as large:
        for _ in range(20):
            torch.ones(64 * MIB // 4).sum()
    assert large.nbytes - small.nbytes > 48 * MIB


def test_the_picture_of_eight_runs(tmp_path: Path) -> None:
    runs = [
        Result(b, [2.0, 1.0], 0.9, 40 * MIB, 5 * (b or 0) * MIB, 40 * MIB if b else 0, 500 * MIB, 0.1, 0.01, 0.99)
        for b in (None, 1, 2, 3, 4, 5, 6, 7, 8)
    ]
    _summary.draw("a model", runs, tmp_path / "demo.svg")
    assert "8 bits, test accuracy 90.0 %" in (tmp_path / "demo.svg").read_text()


def test_smoothing_keeps_the_mean_of_a_line() -> None:
    assert _summary.smooth([5.0]) == [5.0]
    line = [float(i) for i in range(100)]
    assert _summary.smooth(line)[10:90] == pytest.approx(line[10:90])


# What is fetched


@pytest.fixture
def pinned() -> Package:
    return Package("thing==1.0", "thing-1.0-py3-none-any.whl", hashlib.sha256(b"a thing").hexdigest())


@pytest.fixture
def pip(monkeypatch):
    """A pip that writes `content`, or says that it cannot."""
    state = types.SimpleNamespace(content=b"a thing", calls=[], requirements="")

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        state.calls.append(command)
        state.requirements = Path(command[-1]).read_text()
        if state.content is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no network\nERROR: No matching distribution")
        Path(command[command.index("--dest") + 1], "thing-1.0-py3-none-any.whl").write_bytes(state.content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(_fetch.subprocess, "run", run)
    return state


def test_a_package_is_fetched_once_with_its_hash(tmp_path: Path, pinned: Package, pip) -> None:
    for _ in range(2):
        path = fetch(pinned, tmp_path / "cache")
        assert path.read_bytes() == b"a thing"
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [pinned.file]
    (command,) = pip.calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert "--require-hashes" in command
    assert pip.requirements == f"thing==1.0 --hash=sha256:{pinned.sha256}\n"


def test_another_file_than_the_pinned_one_is_refused_and_not_cached(tmp_path: Path, pinned: Package, pip) -> None:
    pip.content = b"another thing"
    with pytest.raises(fewbit.FewbitError, match="is not the file that was pinned: its SHA-256 is"):
        fetch(pinned, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cached_file_that_changed_is_refused(tmp_path: Path, pinned: Package, pip) -> None:
    fetch(pinned, tmp_path).write_bytes(b"a thinh")
    with pytest.raises(fewbit.FewbitError, match="Delete it; the next run fetches it again"):
        fetch(pinned, tmp_path)


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path, pinned: Package, pip) -> None:
    pip.content = None
    with pytest.raises(fewbit.FewbitError) as raised:
        fetch(replace(pinned, source=True), tmp_path)
    assert str(raised.value) == (
        "thing==1.0 could not be fetched.\n"
        "tried: pip download, which said:\nERROR: no network\nERROR: No matching distribution\n"
        "By hand: where there is a network, run\n"
        "  pip download --no-deps --no-binary thing thing==1.0\n"
        f"and put thing-1.0-py3-none-any.whl\n  (SHA-256 {pinned.sha256})\ninto {tmp_path}"
    )


def test_the_demo_without_a_network_has_no_traceback(tmp_path: Path, pip, capsys) -> None:
    pip.content = None
    assert main(["demo", "--task", "reviews", "--cache", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "fewbit: vaderSentiment==3.3.2 could not be fetched." in said
    assert "Traceback" not in said


def test_a_cache_that_cannot_be_written(tmp_path: Path, pinned: Package, pip) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(fewbit.FewbitError, match=r"cannot be written: .*--cache"):
        fetch(pinned, tmp_path / "file")


def test_where_the_cache_is(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fewbit_hooks"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "fewbit_hooks"
    assert cache_folder(Path("here")) == Path(os.getcwd(), "here")


def test_a_folder_of_a_wheel_is_unpacked_once(tmp_path: Path) -> None:
    wheel = tmp_path / "thing-1.0.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing/model/config.json", "{}")
        archive.writestr("thing/modelling.py", "")
    for _ in range(2):
        folder = unpack_folder(wheel, "thing/model", tmp_path)
        assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thing-1.0", "thing-1.0.whl"]


def test_reviews_are_read_with_a_label_where_the_score_is_clear(tmp_path: Path) -> None:
    text = "1\t2.1\tA cliché, but a good one.\r\n2\t-0.6\tTepid.\r\n3\t0.5\tHm.\r\n"
    inner = _tar("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", text.encode())
    archive = tmp_path / "vader.tar.gz"
    archive.write_bytes(_tar("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner))
    assert _reviews.read_reviews(archive) == (["A cliché, but a good one.", "Tepid."], [1, 0])


def _tar(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_the_loss_of_padded_sentences_is_that_of_the_sentence_alone(monkeypatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    encoder = transformers.BertModel(config)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda *_, **__: encoder)
    model = _reviews.Classifier(Path("unused")).eval()
    short = torch.tensor([[2, 7, 3, 0, 0, 0]])
    pair = torch.tensor([[2, 7, 3, 0, 0, 0], [2, 7, 8, 9, 3, 0]])
    with torch.no_grad():
        torch.testing.assert_close(F.softmax(model(pair), 1)[0], F.softmax(model(short), 1)[0])
