"""What `import fewbit_hooks` brings along."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import fewbit_hooks as fewbit

HEAVY = [
    "matplotlib",
    "numba",
    "rich",
    "scipy",
    "sklearn",
    "transformers",
    "timm",
    "triton",
    "pandas",
    "PIL",
    "psutil",
    "pytest",
]


def test_it_imports_torch_and_numpy_and_nothing_else_heavy() -> None:
    code = f"""
import sys, torch, numpy
before = set(sys.modules)
import fewbit_hooks
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
foreign = new - set(sys.stdlib_module_names) - {{"fewbit_hooks"}}
assert foreign <= {{"torch", "numpy"}}, foreign
assert not [name for name in {HEAVY} if name in sys.modules and name not in before]
assert "fewbit_hooks._demo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_public_name_is_there_and_documented() -> None:
    names = [
        "scope",
        "enable",
        "disable",
        "active",
        "codebook",
        "Codebook",
        "activations",
        "register",
        "compare",
        "profile",
        "Profile",
        "Report",
        "FewbitError",
        "FewbitWarning",
    ]
    for name in names:
        assert getattr(fewbit, name).__doc__, name


def test_the_version_is_that_of_the_package() -> None:
    pyproject = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', pyproject, re.MULTILINE).group(1) == fewbit.__version__
