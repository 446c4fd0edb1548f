"""Settings of the process that make CPU training faster and change no result."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# mallopt's parameters in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# The most that glibc's own adjustment of these thresholds comes to on 64-bit systems.
_USUAL_MMAP_THRESHOLD, _USUAL_TRIM_THRESHOLD = 32 * 2**20, 64 * 2**20


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, for the next step to use again.

    By default it maps every large activation anew and gives it back when it is freed: hundreds of thousands of page
    faults in one pass of a large network. For the loops of training and evaluation, once what is needed only to set
    them up has been given back. Does nothing where the C library is another one.
    """
    _set_thresholds(2**31 - 1, 2**31 - 1)


@contextmanager
def freed_memory_as_usual() -> Iterator[None]:
    """Within it, glibc treats freed memory as it does in a process that never asked for anything else."""
    _set_thresholds(_USUAL_MMAP_THRESHOLD, _USUAL_TRIM_THRESHOLD)
    try:
        yield
    finally:
        keep_freed_memory()


def _set_thresholds(mmap: int, trim: int) -> None:
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, mmap)
    mallopt(_M_TRIM_THRESHOLD, trim)
