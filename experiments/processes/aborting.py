"""The end of a process in which JAX finds its coordination broken, and aborts it from a thread of its own."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


class AbortMessage:
    """On SIGABRT, writes what `sentence` returns to standard error and ends the process with exit code 1, until it is closed.

    Python's own handlers run between two lines of Python, to which an aborted process does not come any more.
    """

    def __init__(self, sentence: Callable[[], str]):
        def handle(number: int) -> None:
            os.write(2, f"error: {sentence()}\n".encode())
            os._exit(1)

        self._library = ctypes.CDLL(None)
        self._library.signal.argtypes, self._library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        # Kept, or the handler would be freed.
        self._handler = _HANDLER(handle)
        self._before = self._library.signal(signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p))

    def close(self) -> None:
        """An abort is an abort again."""
        self._library.signal(signal.SIGABRT, self._before)
