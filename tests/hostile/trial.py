"""One input given to one reader, and what is wrong with what came of it."""

from __future__ import annotations

import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.hostile.subject import Subject

LONGEST = 600
"""Characters of an error message."""

_STATUS = Path("/proc/self/status")


class TooLong(BaseException):
    """An input took more CPU time than it may. No `Exception`, so that no reader takes it for bad input."""


def what_is_wrong(subject: Subject, content: bytes, folder: Path, expected: object) -> str | None:
    """What is wrong with how the library reads `content`; None for nothing. `expected`: what the seed gives."""
    # An input that ended its process has left its folder.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    _forget_peak()
    before = _memory("VmRSS")
    try:
        with _limited(subject.seconds):
            result = subject.read(folder, content)
        if subject.checked and result != expected:
            return "it was read as something else"
    except subject.refused as error:
        if problem := message_problem(str(error)):
            return problem
    except TooLong:
        return f"it took more than {subject.seconds} s"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:300]!r} in {Path(where.filename).name}, line {where.lineno}"
    finally:
        shutil.rmtree(folder)
    grown = _memory("VmHWM") - before
    return f"memory grew by {grown / 2**20:.0f} MiB" if grown > subject.memory else None


def message_problem(message: str) -> str | None:
    """What is wrong with an error message: not one line, too long, or characters that a terminal would act on."""
    if not message or len(message) > LONGEST:
        return f"a message of {len(message)} characters: {message[:100]!r}"
    return None if message.isprintable() else f"a message with control characters: {message[:LONGEST]!r}"


def guard(memory: int) -> None:
    """Bounds the address space of this process, so that a mistake cannot take the machine's memory."""
    if sys.platform.startswith("linux"):
        resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + memory, resource.RLIM_INFINITY))


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises `TooLong` after so many seconds of CPU time."""

    def stop(*_: object) -> None:
        raise TooLong

    earlier: Callable | int | None = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, earlier)


def _forget_peak() -> None:
    if _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")


def _memory(name: str) -> int:
    """A number of this process's memory in bytes; 0 where the system does not say."""
    if not _STATUS.exists():
        return 0
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
