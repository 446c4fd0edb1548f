"""Process settings: stop signals, progress, freed memory, CUDA kernels, and the cores and GPUs of parallel runs."""

import ctypes
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h

LINE = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}"
LINE_SECONDS = 60.0  # between two lines without a terminal


class _Lines(io.TextIOBase):
    def write(self, text: str) -> int:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)
        return len(text)


def progress(iterable: Any = None, **options: Any) -> Any:
    """Return a tqdm bar with these options: on a terminal a bar that is removed at the end, else a line a minute."""
    options = {"unit": "step", "dynamic_ncols": sys.stderr.isatty()} | options
    if not options["dynamic_ncols"]:
        options |= dict.fromkeys(("mininterval", "maxinterval", "delay"), LINE_SECONDS)
        options |= {"file": _Lines(), "miniters": 1, "bar_format": LINE}
    return tqdm(iterable, leave=False, **options)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step.

    By default, it maps and unmaps every large activation, which causes hundreds of thousands of page faults in one
    pass of a large network. Has no effect with other C libraries.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    if not mallopt(_M_MMAP_THRESHOLD, 2**31 - 1):  # some versions refuse this value
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the largest of the others
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def choose_cuda_kernels(device: torch.device, deterministic: bool) -> None:
    """On CUDA, use cuDNN's fastest kernels, or only deterministic ones. Must precede the first matrix product."""
    if device.type != "cuda":
        return
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not deterministic  # shapes are static


def slot_environment(device: str, slot: int, at_once: int, processes: int = 1) -> dict[str, str]:
    """Return environment variables that divide cores and GPUs among ``at_once`` runs of so many ``processes`` each.

    A numbered ``device`` is kept.
    """
    environment = {}
    if at_once * processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(
            max(len(os.sched_getaffinity(0)) // (at_once * processes), 1)
        )
    count = torch.cuda.device_count()
    if at_once > 1 and count > 1 and device in ("auto", "cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        gpus = visible if len(visible) == count else [str(number) for number in range(count)]
        used = [
            gpus[(slot * processes + number) % count] for number in range(min(processes, count))
        ]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(used)
    return environment


@contextmanager
def stop_signals(
    request: Callable[[int], None], signals: Sequence[signal.Signals] = STOP_SIGNALS
) -> Iterator[None]:
    """Call ``request`` with the number of the first signal of each kind; a second one exits at once, without saving."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in signals}
    if before.get(signal.SIGHUP) is signal.SIG_IGN:  # started by nohup
        del before[signal.SIGHUP]
    received: set[int] = set()

    def handle(number: int, frame: FrameType | None) -> None:
        if number in received:
            os.write(2, b"stopped at once: the last saved state is intact\n")
            os._exit(128 + number)  # an exception could wait for a thread
        received.add(number)
        request(number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
