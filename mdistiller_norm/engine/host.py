"""Settings of the process that make CPU training faster and change no result."""

from __future__ import annotations

import ctypes
import sys

# mallopt's parameters in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, for the next step to use again.

    By default it maps every large activation anew and gives it back when it is freed: hundreds of thousands of page
    faults in one pass of a large network. Does nothing where the C library is another one.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
