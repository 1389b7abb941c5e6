"""All runs, one after the other, each in a fresh process: none finds the memory or the random state of another."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from .._errors import FewbitError
from ._task import Settings, load
from ._training import Result, run

EXTRAS = {"digits": ("matplotlib", "rich", "sklearn"), "reviews": ("matplotlib", "rich", "transformers")}


def demo(settings: Settings) -> None:
    """Train the task with stock PyTorch and with few bits; print a table, draw a picture.

    Raises:
        FewbitError: an extra is missing, the task's packages cannot be fetched, or a run failed.
    """
    extras(settings.task)
    from . import _summary

    _summary.check_picture(settings.output)
    _check_device(settings.device)

    with _summary.waiting("loading " + settings.task):
        task = load(settings)
    # Threads that wait busily cost a run on shared cores five times its time (measured; a tenth on free ones).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    variants: list[int | None] = [None, *dict.fromkeys(settings.bits)]
    results = []
    with _summary.progress(task.title, len(variants), task.steps(settings)) as advance:
        for bits in variants:
            results.append(_in_a_process(settings, bits, advance(bits)))
    _summary.show(task, settings, results)


def extras(task: str) -> None:
    """Say at once what is not installed."""
    missing = [name for name in EXTRAS[task] if importlib.util.find_spec(name) is None]
    if missing:
        raise FewbitError(f'the demo needs {" and ".join(missing)}: pip install "fewbit-hooks[demo]"')


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as reason:  # a torch without CUDA asserts
        raise FewbitError(f"the device {device!r} cannot be used: {str(reason).splitlines()[0]}") from None


def _in_a_process(settings: Settings, bits: int | None, told: Callable[[float], None]) -> Result:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(settings, bits, sender), daemon=True)
    process.start()
    sender.close()  # the child's end alone is left, so that its death is seen
    try:
        while True:
            message = receiver.recv()
            if isinstance(message, Result):
                process.join()
                return message
            if isinstance(message, str):
                raise FewbitError(f"the run with {_what(bits)} failed:\n{message}")
            told(message)
    except EOFError:
        process.join()
        raise FewbitError(
            f"the process of the run with {_what(bits)} ended with exit code {process.exitcode}; "
            "-9 says that the system ran out of memory"
        ) from None
    finally:
        process.terminate()


def _what(bits: int | None) -> str:
    return "stock PyTorch" if bits is None else f"bits={bits}"


def _child(settings: Settings, bits: int | None, sender: Connection) -> None:
    """Send every loss, then the result; or, as a string, what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    warnings.simplefilter("ignore")  # of other libraries, across the progress bar
    try:
        sender.send(run(load(settings), bits, settings, sender.send))
    except Exception:
        sender.send(traceback.format_exc())
