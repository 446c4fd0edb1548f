"""Signals that stop a program after its state is saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@contextmanager
def stop_signals(
    request: Callable[[int], None], signals: Sequence[signal.Signals] = STOP_SIGNALS
) -> Iterator[None]:
    """Call ``request`` with the number of the first signal of each kind; a second one exits at once, without saving."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {int(number): signal.getsignal(number) for number in signals}
    if before.get(signal.SIGHUP) is signal.SIG_IGN:  # started by nohup
        del before[signal.SIGHUP]
    received: set[int] = set()

    def handle(number: int, frame: FrameType | None) -> None:
        if number in received:
            os.write(2, b"stopped at once: the last saved state is intact\n")
            os._exit(128 + number)  # raising could block in the exit handlers of threads
        received.add(number)
        request(number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
