"""Process settings: freed memory, CUDA kernels, and the cores and GPUs of parallel runs."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h
# Upper limits of glibc's dynamic thresholds on 64-bit systems.
_USUAL_MMAP_THRESHOLD, _USUAL_TRIM_THRESHOLD = 32 * 2**20, 64 * 2**20


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step.

    By default, it maps and unmaps every large activation, which causes hundreds of thousands of page faults in one
    pass of a large network. Has no effect with other C libraries.
    """
    _set_thresholds(2**31 - 1, 2**31 - 1)


@contextmanager
def freed_memory_as_usual() -> Iterator[None]:
    """Restore glibc's default treatment of freed memory within the context."""
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
    mallopt(_M_MMAP_THRESHOLD, mmap) or mallopt(_M_MMAP_THRESHOLD, _USUAL_MMAP_THRESHOLD)  # some versions have a limit
    mallopt(_M_TRIM_THRESHOLD, trim)


def choose_cuda_kernels(deterministic: bool) -> None:
    """Let cuDNN use its fastest kernels, or only deterministic ones.

    Call it before the first matrix product, else cuBLAS may ignore it. Operations without a deterministic kernel cause
    a warning.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not deterministic  # shapes are static


def slot_environment(device: str, slot: int, at_once: int, processes: int = 1) -> dict[str, str]:
    """Return environment variables that divide cores and GPUs among parallel runs.

    Args:
        device: ``DEVICE`` of the run; a numbered one is kept.
        slot: index of the run among the parallel ones.
        at_once: number of parallel runs.
        processes: of each run.
    """
    environment = {}
    if at_once * processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // (at_once * processes), 1))
    count = torch.cuda.device_count()
    if at_once > 1 and count > 1 and device in ("auto", "cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        gpus = visible if len(visible) == count else [str(number) for number in range(count)]
        used = [gpus[(slot * processes + number) % count] for number in range(min(processes, count))]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(used)
    return environment
