"""Torch's own threads, for compiled loops of ours.

NOTE [ Torch's threads ]

On the CPU torch works with a team of OpenMP threads, which go on spinning for a while after each operation so that the
next begins at once. Other threads would have the same cores as those: (measured, 2 cores, in a step) a second one gains
nothing. So a loop of ours is run as an operation of torch's is, by `GOMP_parallel`, the entry to which a compiler turns
`#pragma omp parallel`, of the very library that libtorch_cpu is linked to.

1. What is run is machine code that needs no GIL and raises nothing: 100 threads begin in the time of 2.
2. All of the team runs, as with torch: libgomp ends the threads that a smaller region leaves out, and makes them again.
3. A forked child has no team, and would wait for it for ever, as torch's own operations would: there, and where the
   library cannot be had (torch built without OpenMP, or for Windows), the calling thread works alone.
4. A region that numba has kept on disk is made again when the file changes in which it stands, not when this one does.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

JOB = 8
"""Numbers, int64, that a region is handed: the first is how many groups there are, the last the bits of a float64."""

_THREAD, _THREADS = "omp_get_thread_num", "omp_get_num_threads"
_thread = types.ExternalFunction(f"fewbit_hooks_{_THREAD}", types.int32())
_threads = types.ExternalFunction(f"fewbit_hooks_{_THREADS}", types.int32())
_process = os.getpid()


def cached(compiler: Callable[..., Any], *signature: Any, **options: Any) -> Callable[[Any], Any]:
    """A compiler of numba's that keeps what it compiles on disk, where there is a place for it."""

    def compiled(loop: Any) -> Any:
        try:
            return compiler(*signature, cache=True, **options)(loop)
        except RuntimeError:
            return compiler(*signature, **options)(loop)

    return compiled


def region(loop: Any) -> Any:
    """Compiles what each thread of the team does: a function of the address of the job."""
    assert _library() is not None  # it has named the entries that the code is linked to
    return cached(numba.cfunc, types.void(types.voidptr))(loop)


@intrinsic
def _pointer(typing_context, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@register_jitable
def array_at(address, size, dtype):
    """The array that lies there, in a region."""
    return numba.carray(_pointer(address), (size,), dtype)


@register_jitable
def job_at(data):
    """The job, in a region."""
    return numba.carray(data, (JOB,), np.int64)


@register_jitable
def scale_of(data):
    """The last number of the job, in a region."""
    return numba.carray(data, (JOB,), np.float64)[JOB - 1]


@register_jitable
def share_of(groups):
    """The first group that is the running thread's, and how many are, in a region."""
    thread, threads = _thread(), _threads()
    first = groups * thread // threads
    return first, groups * (thread + 1) // threads - first


def threads() -> int:
    """How many threads `run` works with; 1: the calling one, and it is not to be called."""
    count = torch.get_num_threads()
    return count if count > 1 and os.getpid() == _process and _library() is not None and _works(count) else 1


def run(address: int, job: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    """Have each thread of the team run the region at that address."""
    library = _library()
    assert library is not None
    library.GOMP_parallel(address, job.ctypes.data, 0, 0)


@functools.cache
def _library() -> Any:
    """What libtorch_cpu is linked to, if that has OpenMP's entries; else None."""
    folder = Path(torch.__file__).parent / "lib"
    for path in (folder / "libtorch_cpu.so", folder / "libtorch_cpu.dylib"):
        if path.exists() and "ATen parallel backend: OpenMP" in torch.__config__.parallel_info():
            library = ctypes.CDLL(str(path))  # of an open library this is its handle
            if not all(hasattr(library, name) for name in (_THREAD, _THREADS, "GOMP_parallel")):
                return None
            for name in (_THREAD, _THREADS):
                address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
                llvmlite.binding.add_symbol(f"fewbit_hooks_{name}", address)
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            return library
    return None


@functools.cache
def _works(count: int) -> bool:
    """Whether so many threads, and each as one of so many, run a region."""
    seen = np.zeros(count, np.int64)
    run(_count_off().address, np.array([count, seen.ctypes.data] + [0] * (JOB - 2)))
    return bool((seen == 1).all())


@functools.cache
def _count_off() -> Any:
    @region
    def count_off(data):
        job = job_at(data)
        first, n = share_of(job[0])
        if n == 1:
            array_at(job[1], job[0], np.int64)[first] += 1

    return count_off
