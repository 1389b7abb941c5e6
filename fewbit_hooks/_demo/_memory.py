"""The peak of a process's memory, such that runs can be compared."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from types import TracebackType

import torch

INTERVAL = 0.002
"""Seconds between two looks; a look takes some 20 microseconds."""

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
_SMALL, _LARGE = (
    128 * 2**10,
    32 * 2**20,
)  # glibc's defaults: at the start, and the most it raises the first to by itself


class PeakMemory:
    """The most resident memory (psutil) of this process inside it; on CUDA, the most that torch allocated there.

    glibc keeps what is freed for later and gives little of it back to the system (measured: the 3-bit ViT then peaks as
    high as stock's), so that what a run holds cannot be told from what it once held. So until `stop()` every large
    allocation gets pages of its own, which go back when it is freed. That costs page faults, therefore it is not for
    the whole run. Other allocators are left as they are.
    """

    def __init__(self, device: str) -> None:
        self._cuda = torch.device(device) if device.startswith("cuda") else None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.nbytes = 0

    def __enter__(self) -> PeakMemory:
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        else:
            _malloc(_MMAP_THRESHOLD, _SMALL)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Look no further."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        if self._cuda is not None:
            self.nbytes = torch.cuda.max_memory_allocated(self._cuda)
        else:
            self._thread.join()
            _malloc(_MMAP_THRESHOLD, _LARGE)
            _malloc(_TRIM_THRESHOLD, 2 * _LARGE)

    def _watch(self) -> None:
        import psutil

        process = psutil.Process()
        while not self._stopped.wait(INTERVAL):
            self.nbytes = max(self.nbytes, process.memory_info().rss)


def _malloc(option: int, value: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
            ctypes.CDLL(None).mallopt(option, value)
