"""Torch's own threads: every group of a region is somebody's, once; and where there is no team, the caller's."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fewbit_hooks import ops
from fewbit_hooks.ops import _torch

from .conftest import torch_threads

pytest.importorskip("numba", reason="numba is not installed")

from fewbit_hooks.ops import _numba, _team

has_a_team = pytest.mark.skipif(
    not sys.platform.startswith("linux") or "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info(),
    reason="this torch has no team of OpenMP threads on Linux",
)


@pytest.fixture(autouse=True)
def eight_threads() -> Iterator[None]:
    with torch_threads(8):
        yield


@pytest.fixture(scope="module")
def count() -> int:
    """The address of a region that counts how often each group is worked on, and by which thread."""

    @_team.region
    def region(data):
        job = _team.job_at(data)
        first, n = _team.share_of(job[0])
        seen = _team.array_at(job[1] + 8 * first, n, np.int64)
        for i in range(n):
            seen[i] += 1
        _team.array_at(job[2], job[0], np.int64)[first : first + n] = first

    address: int = region.address
    return address


@has_a_team
def test_there_are_as_many_threads_as_torch_has() -> None:
    assert _team.threads() == 8
    torch.set_num_threads(3)
    assert _team.threads() == 3
    torch.set_num_threads(1)
    assert _team.threads() == 1


@has_a_team
@pytest.mark.parametrize("groups", [0, 1, 2, 7, 8, 9, 63, 1000])
def test_each_group_is_worked_on_once_and_all_threads_work(count: int, groups: int) -> None:
    seen, by = np.zeros(groups, np.int64), np.zeros(groups, np.int64)
    _team.run(count, np.array([groups, seen.ctypes.data, by.ctypes.data] + [0] * (_team.JOB - 3)))
    assert (seen == 1).all()
    assert len(set(by)) == min(groups, 8)
    if groups >= 8:
        assert np.unique(by, return_counts=True)[1].max() <= -(-groups // 8)


def shared_out(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The jobs that are handed to the team from now on, by their numbers of groups; any length is enough for one."""
    _team.threads()  # which asks, the first time
    jobs: list[int] = []
    run = _team.run
    monkeypatch.setattr(_numba, "FEW", 0)
    monkeypatch.setattr(_team, "run", lambda address, job: jobs.append(int(job[0])) or run(address, job))
    return jobs


@has_a_team
def test_what_is_large_is_shared_out_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = shared_out(monkeypatch)
    monkeypatch.setattr(_numba, "FEW", 256)
    for n in (248, 256):
        _numba.encode(torch.randn(n).bfloat16(), 3, ops.Thresholds([0.0]))
    assert jobs == [32]


@pytest.mark.parametrize("why", ["one thread", "no library", "a library of another kind", "another process"])
def test_without_a_team_the_calling_thread_works_alone(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = shared_out(monkeypatch)
    if why == "one thread":
        torch.set_num_threads(1)
    elif why == "no library":
        monkeypatch.setattr(_team, "_library", lambda: None)
    elif why == "a library of another kind":
        monkeypatch.setattr(_team, "_works", lambda count: False)
    else:
        monkeypatch.setattr(_team, "_process", -1)
    x, coder = torch.randn(1000).bfloat16(), ops.Thresholds([-1.0, 0.0, 1.0])
    packed = _numba.encode(x, 3, coder)
    assert torch.equal(packed, _torch.encode(x, 3, coder))
    assert not jobs


@has_a_team
def test_threads_of_another_number_than_they_say_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    _team._works.cache_clear()
    run = _team.run

    def one_fewer(address: int, job: np.ndarray) -> None:
        torch.set_num_threads(7)
        run(address, job)
        torch.set_num_threads(8)

    monkeypatch.setattr(_team, "run", one_fewer)
    try:
        assert _team.threads() == 1
    finally:
        _team._works.cache_clear()


@has_a_team
def test_threads_of_pythons_have_a_team_each(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = shared_out(monkeypatch)
    xs = [torch.randn(10_000).bfloat16() for _ in range(4)]
    coder, wrong = ops.Thresholds([-1.0, 0.0, 1.0]), []

    def work(x: torch.Tensor) -> None:
        expected = _torch.encode(x, 3, coder)
        for _ in range(50):
            if not torch.equal(_numba.encode(x, 3, coder), expected):
                wrong.append(x)

    workers = [threading.Thread(target=work, args=(x,)) for x in xs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert jobs


FORK = """
import os, torch
from fewbit_hooks import ops
from fewbit_hooks.ops import _numba, _team
_numba.FEW = 0
torch.set_num_threads(8)
x, coder = torch.arange(1000).bfloat16(), ops.Thresholds([500.0])
expected = _numba.encode(x, 1, coder)
pid = os.fork()
if pid == 0:
    os._exit(0 if torch.equal(_numba.encode(x, 1, coder), expected) else 1)
print(_team.threads(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@has_a_team
def test_a_forked_process_does_not_wait_for_threads_that_it_has_not() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=240)
    assert done.stdout == "8 0\n", done.stderr
