"""Settings of processes: what becomes of freed memory, which cores and GPUs are theirs, which kernels CUDA takes."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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


def choose_cuda_kernels(deterministic: bool) -> None:
    """Let cuDNN try its kernels and take the fastest, or only take those that give the same bits in every run.

    Args:
        deterministic: an operation without such a kernel is a warning. Asked for after the first matrix product of the
            process, cuBLAS may not follow.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not deterministic  # shapes are static: each is tried once


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
    # Where glibc takes no larger threshold than its own largest: that one, which it would else not come to any more.
    mallopt(_M_MMAP_THRESHOLD, mmap) or mallopt(_M_MMAP_THRESHOLD, _USUAL_MMAP_THRESHOLD)
    mallopt(_M_TRIM_THRESHOLD, trim)


def slot_environment(device: str, slot: int, at_once: int, processes: int = 1) -> dict[str, str]:
    """What tells runs that stand side by side which cores and GPUs are theirs: variables for their environment.

    Args:
        device: ``DEVICE`` of the run; one that is named by its number is left to it.
        slot: its number among those that run, from 0.
        at_once: how many run at a time.
        processes: of each.
    """
    environment = {}
    if at_once * processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // (at_once * processes), 1))
    count = torch.cuda.device_count()
    if at_once > 1 and count > 1 and device in ("auto", "cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        gpus = visible if len(visible) == count else [str(number) for number in range(count)]
        mine = [gpus[(slot * processes + number) % count] for number in range(min(processes, count))]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    return environment
