"""What happens on Ctrl-C and on `kill`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

WATCHED = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> Iterator[None]:
    """SIGINT and SIGTERM call `handler`, until the end of the block. Does nothing outside the main thread, where Python does not
    allow it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in WATCHED}
    for number in WATCHED:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that the number of a SIGINT or SIGTERM is put on, instead of ending the process at once.

    A second one ends it as usual.
    """
    requested: list[int] = []
    before = {number: signal.getsignal(number) for number in WATCHED}

    def remember(number: int, frame: object) -> None:
        requested.append(number)
        signal.signal(number, before[signal.Signals(number)])

    with stop_signals(remember):
        yield requested
