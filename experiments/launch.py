"""The process that a command runs in, settled before anything large is allocated."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import sys
from pathlib import Path

import jax

from experiments.config.errors import ConfigError

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

PACKAGES = ("data", "estimators", "unet")


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


def use_cpu_devices(count: int) -> None:
    """Let a CPU count as so many devices, but for what was settled before: by XLA_FLAGS, or by a use of JAX.

    Raises `ConfigError` where JAX_PLATFORMS names what is not there.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Too late where JAX has been used: then there are as many devices as there are.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", min(count, os.cpu_count() or 1))
    try:
        jax.devices()
    except RuntimeError as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"JAX finds no device ({reason}): JAX_PLATFORMS is {asked!r}; unset it, or name cpu"
        ) from None
