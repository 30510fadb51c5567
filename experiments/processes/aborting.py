"""The end of a process in which JAX finds its coordination broken, and aborts it from a thread of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


class AbortMessage:
    """On SIGABRT, writes what `sentence` returns to standard error and ends the process with exit code 1, until it is closed.

    Python's own handlers run between two lines of Python, to which an aborted process does not come any more.
    """

    def __init__(self, sentence: Callable[[], str]):
        def handle(number: int) -> None:
            os.write(self._errors, f"{sentence()}\n".encode())
            os._exit(1)

        self._errors = 2

        self._library = ctypes.CDLL(None)
        self._library.signal.argtypes, self._library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        # Kept, or the handler would be freed.
        self._handler = _HANDLER(handle)
        self._before = self._library.signal(signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p))

    @contextmanager
    def captured(self) -> Iterator[Callable[[], str]]:
        """Keeps back what JAX's libraries write to standard error, to the end of the block, or for ever in an aborted process.
        Gives a function that tells it."""
        with tempfile.TemporaryFile() as file:
            self._errors = os.dup(2)
            os.dup2(file.fileno(), 2)

            def content() -> bytes:
                return os.pread(file.fileno(), 1 << 20, 0)

            try:
                yield lambda: content().decode(errors="replace")
            finally:
                os.dup2(self._errors, 2)
                os.close(self._errors)
                self._errors = 2
                os.write(2, content())

    def close(self) -> None:
        """An abort is an abort again."""
        self._library.signal(signal.SIGABRT, self._before)
