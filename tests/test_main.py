"""The command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fewbit_hooks as fewbit
from fewbit_hooks import _doctor, _policy, _two_valued, ops
from fewbit_hooks.__main__ import main


def test_codebook_prints_boundaries_levels_and_error(capsys) -> None:
    assert main(["codebook", "gelu", "--bits", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    book = fewbit.codebook("gelu", 2)
    assert lines[0].startswith("gelu(approximate=none), 2 bits: error 0.040")
    assert lines[1] == "not folded: the boundaries are on x"
    table = [[float(cell) for cell in line.split()] for line in lines[3:]]
    assert [row[2] for row in table[:-1]] == pytest.approx(book.boundaries, abs=1e-5)
    assert [row[3] for row in table] == pytest.approx(book.levels, abs=1e-5)
    assert len({len(line) for line in lines[2:]}) == 1  # aligned


def test_a_folded_codebook_says_so(capsys) -> None:
    assert main(["codebook", "tanh"]) == 0
    assert "folded: the derivative is even, and the boundaries are on |x|" in capsys.readouterr().out


def test_codebook_takes_parameters_weight_and_interval(capsys) -> None:
    assert main(["codebook", "elu", "--param", "alpha=2.0", "--interval", "-5", "5", "--json"]) == 0
    book = fewbit.Codebook.from_json(capsys.readouterr().out)
    assert book == fewbit.codebook("elu", 3, interval=(-5, 5), alpha=2.0)
    assert main(["codebook", "gelu", "--param", "approximate=tanh", "--weight", "normal", "--bits", "4", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["parameters"] == {"approximate": "tanh"}
    assert content["weight"] == "normal(0, 1)"


def test_codebook_draws(tmp_path: Path, capsys) -> None:
    picture = tmp_path / "silu.png"
    assert main(["codebook", "silu", "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["codebook", "gleu"], "fewbit: no activation 'gleu'. Known activations: "),
        (["codebook", "relu"], "fewbit: relu is exact at 1 bit and needs no codebook"),
        (["codebook", "silu", "--param", "alpha=1"], "fewbit: silu has no parameter 'alpha'"),
        (["codebook", "silu", "--weight", "triangle"], "fewbit: weight must be "),
        (["demo", "--device", "abacus"], "fewbit: the device 'abacus' cannot be used: "),
        (["demo", "--output", "/nowhere/demo.png"], "fewbit: the picture cannot be drawn into /nowhere/demo.png"),
        (["demo", "--output", "demo.doc"], "fewbit: the picture cannot be drawn into demo.doc: its ending must be"),
    ],
)
def test_an_error_is_one_message_and_status_2(arguments: list[str], message: str, capsys) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith(message)
    assert "Traceback" not in said.err
    assert not said.out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["profiler"],
        ["codebook", "gelu", "--bits", "9"],
        ["codebook", "elu", "--param", "alpha"],
        ["codebook", "gelu", "--json", "--plot", "gelu.png"],
        ["demo", "--bits", "0"],
        ["demo", "--epochs", "0"],
        ["demo", "--task", "poems"],
    ],
)
def test_arguments_that_argparse_refuses(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: python -m fewbit_hooks" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["demo"], ["codebook"], ["doctor"]])
def test_help(command: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    assert capsys.readouterr().out.startswith("usage: python -m fewbit_hooks")


def test_doctor_as_a_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fewbit_hooks", "doctor"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("everything works")
    assert torch.__version__ in done.stdout
    assert f"\ncoding on cpu   {ops.backend(torch.device('cpu'))}\n" in done.stdout
    assert "\nfused on cpu    PyTorch's own kernels: Triton's are for cuda\n" in done.stdout
    for activation in fewbit.activations():
        assert f"\n{activation.name} " in done.stdout


def test_doctor_checks_the_library_even_where_scopes_are_disabled(monkeypatch, capsys) -> None:
    monkeypatch.setenv("FEWBIT_DISABLE", "1")
    assert main(["doctor"]) == 0
    assert "1: every scope is a no-op" in capsys.readouterr().out


def test_doctor_has_status_1_where_codes_are_wrong(monkeypatch, capsys) -> None:
    monkeypatch.setattr(_doctor, "TOLERANCE", -1.0)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"is the gradient the codebook's level\? +no: off by", said)
    assert "something is wrong" in said


def test_doctor_has_status_1_where_what_is_exact_is_not(monkeypatch, capsys) -> None:
    monkeypatch.setattr(_policy, "_plans", {})
    monkeypatch.setattr(_two_valued, "_between", lambda values, second, nan: ops.Between(0.25, 0.75))
    assert main(["doctor"]) == 1
    assert re.search("exact gradients stock's.* no: clamp, hardshrink, hardsigmoid, ", capsys.readouterr().out)


def test_a_picture_that_cannot_be_drawn_is_an_error_not_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert main(["codebook", "gelu", "--plot", "/nonexistent/x.png"]) == 2
    assert capsys.readouterr().err.startswith("fewbit: ")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--plot", "/nonexistent/x.png"], "there is no folder /nonexistent"),
        (["--plot", "x.txt"], "must end in .png, .svg or .pdf, got x.txt"),
        (["--device", "foo"], "foo: "),
    ],
)
def test_a_profile_is_not_begun_that_could_not_be_finished(
    option: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["profile", "gpt2", *option])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_function_of_ones_own_is_named_rightly_or_the_error_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("number = 3\ndef given(x): return x\n")
    monkeypatch.chdir(tmp_path)
    for name, message in (
        (":x", "Empty module name"),
        ("mine:number", "3 is not a callable object"),
        ("mine:given", "missing a required argument: 'x'"),
    ):
        assert main(["profile", name]) == 2
        assert message in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    script = "-m fewbit_hooks codebook sigmoid --bits 8"
    shell = f"{sys.executable} {script} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", shell], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
