"""The process a run lives in, set up before anything large is allocated."""

from __future__ import annotations

import os
import platform
import sys

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


def with_large_pages(module: str) -> None:
    """Start this process again with memory settings that glibc reads only at its start, unless they are set already.

    Worth a third of the time of a training step on a CPU. Does nothing elsewhere than on Linux with glibc, or where the
    user has GLIBC_TUNABLES of their own. `module` is what `python -m` was given.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
        return
    environment = {**os.environ, "GLIBC_TUNABLES": MEMORY_SETTINGS}
    os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment)
