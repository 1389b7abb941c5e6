"""A forked process finds every lock open."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
import torch.nn.functional as F

import fewbit_hooks as fewbit
from fewbit_hooks import _catalog, _composites
from fewbit_hooks.ops import _dispatch


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # threads are what it is about
def test_a_lock_that_another_thread_held_is_open_in_a_forked_process() -> None:
    opened, x = fewbit.scope(bits=3, min_bytes=0), torch.randn(64, requires_grad=True)
    locks = [opened._ledger._lock, _composites._lock, _catalog._lock, _dispatch._lock]
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        for lock in locks:
            lock.acquire()
        held.set()
        forked.wait()
        for lock in locks:
            lock.release()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # which ends the process, were it to wait for ever
        with opened:
            F.gelu(x)
        open_to_us = all(lock.acquire(blocking=False) for lock in locks)
        os._exit(0 if open_to_us else 1)
    forked.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
