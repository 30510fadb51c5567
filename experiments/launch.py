"""The process that a command runs in, from before its first import until after its last line.

Nothing here imports more than Python's own modules: a command takes seconds to import the rest, and has to answer meanwhile.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, Protocol, runtime_checkable

MEMORY_SETTINGS = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "hugetlb": 1,  # large pages: XLA takes its work space anew every step, and every page of it faults
        "mmap_max": 0,  # keep that space in the heap between steps …
        "mmap_threshold": 8 << 30,
        "trim_threshold": 8 << 30,  # … and never give it back
        "top_pad": 256 << 20,
        "arena_max": 1,  # and one heap for all threads, or each fills its own and gives it back
    }.items()
)


@runtime_checkable
class Stream(Protocol):
    """What is used of a standard stream, whatever stands for it."""

    def write(self, text: str, /) -> int: ...

    def flush(self) -> None: ...

    def isatty(self) -> bool: ...

    def fileno(self) -> int: ...


PACKAGES = ("data", "estimators", "unet")

STOPPED = 128 + signal.SIGINT
"""The exit code after Ctrl-C."""
CLOSED = 128 + 13
"""The exit code where nobody reads standard output any more, as of programs that SIGPIPE (13) ends."""


def own_cores() -> int:
    """The cores that this process may run on: fewer than the machine's under `taskset` and in most batch systems."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def begin() -> None:
    """Settle the process of `python -m experiments.…`, before that command imports anything.

    Ends it with one line where a package of this library is hidden, and on Ctrl-C until `interruptible` is called.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop_at_once)
    _hold_back(signal.SIG_UNBLOCK)
    if (hidden := hidden_package()) is not None:
        print(f"error: {hidden}", file=sys.stderr)
        sys.exit(2)
    # A Ctrl-C while Python starts anew comes to the new process once it is here.
    _hold_back(signal.SIG_BLOCK)
    with_large_pages()
    _hold_back(signal.SIG_UNBLOCK)
    # A file that is opened next would get the number of a standard stream that is closed, and what is meant for that stream.
    open_descriptors()
    # Of a notebook that starts this: matplotlib refuses to be imported where it knows no such backend. Figures go to files.
    os.environ.pop("MPLBACKEND", None)
    replace_unknown(sys.stdout)


def interruptible() -> None:
    """From here on Ctrl-C raises `KeyboardInterrupt`, as usual in Python."""
    if signal.getsignal(signal.SIGINT) is _stop_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def program(main: Callable[[], int]) -> NoReturn:
    """Run a command and end the process with its exit code, in silence where nobody reads its output or where it is stopped."""
    with_large_pages()
    try:
        code = main()
    except KeyboardInterrupt:
        code = STOPPED
    except SystemExit as stopped:
        code = _code(stopped.code)
    # While Python waits for the threads and exit handlers of the libraries.
    signal.signal(signal.SIGINT, lambda *_: os._exit(code))
    for stream in (sys.stdout, sys.stderr):
        drop_unwritten(stream)
    if code == STOPPED:
        # Threads of the libraries that were at work, as on a checkpoint, would each end in a traceback now.
        to_nowhere(2)
    sys.exit(code)


def _code(given: object) -> int:
    """The exit code that Python makes of a `SystemExit`: a text is a failure, and written."""
    if given is None or isinstance(given, int):
        return given or 0
    sys.stderr.write(f"{given}\n")
    return 1


def to_nowhere(descriptor: int) -> None:
    """Have everything that is written there vanish."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def drop_unwritten(stream: Stream | None) -> None:
    """Forget what a stream holds that cannot be written, or Python would complain of it at the very end."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        to_nowhere(stream.fileno())


def replace_unknown(stream: Stream | None) -> None:
    """Have a stream put question marks for characters that its encoding does not have."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def open_descriptors() -> None:
    """Connect those of the three standard streams that are closed to nothing."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number, which is this one.
            os.open(os.devnull, os.O_RDWR)


def _hold_back(how: int) -> None:
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(how, {signal.SIGINT})


def _stop_at_once(number: int, frame: object) -> None:
    os.write(2, b"stopped\n")
    os._exit(STOPPED)


def with_large_pages() -> None:
    """Start this process again with memory settings that glibc reads only at its start, unless they are set already.

    Worth a third of the time of a training step on a CPU. The new process has the whole command line of the old one: options of
    the interpreter, and whatever program runs this one (`python -m coverage run -m …`). Does nothing elsewhere than on Linux
    with glibc, where the user has GLIBC_TUNABLES of their own, and under a debugger or a profiler, which would lose its process.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
        return
    if watched() or not sys.executable or not sys.orig_argv[1:]:
        return
    environment = {**os.environ, "GLIBC_TUNABLES": MEMORY_SETTINGS}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def watched() -> bool:
    """Whether a debugger, a profiler or a measurement of coverage follows this process."""
    monitoring = getattr(sys, "monitoring", None)
    tools = monitoring is not None and any(monitoring.get_tool(number) for number in range(6))
    return sys.gettrace() is not None or sys.getprofile() is not None or tools


def hidden_package() -> str | None:
    """One sentence where a module of the user's, found first, hides a package of this library; None where none does."""
    root = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
        if origin is None or origin.parent.parent != root:
            where = "nowhere" if origin is None else str(origin)
            return (
                f"the package {name} of this library is hidden by another module of that name ({where}): run from another "
                "folder, or rename it"
            )
    return None
