"""The devices that a command computes on."""

from __future__ import annotations

import contextlib
import os

import jax

from experiments.config.errors import ConfigError
from experiments.launch import own_cores

CPU_DEVICES = 2
"""Two halves of a batch side by side beat one product on two cores, at the sizes that a CPU trains."""


def use_cpu_devices(count: int) -> None:
    """`settle_cpu_devices`, and `require_devices`."""
    settle_cpu_devices(count)
    require_devices()


def settle_cpu_devices(count: int, named: int = 1) -> None:
    """Let a CPU count as so many devices, one for each core of the process at most, or as the `named` ones that a mesh needs, but
    for what was settled before: by XLA_FLAGS, or by a use of JAX. Several processes have to do this before they meet."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Too late where JAX has been used: then there are as many devices as there are.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", max(named, min(count, own_cores())))


def require_devices() -> None:
    """Raise `ConfigError` where JAX_PLATFORMS names what is not there."""
    try:
        jax.devices()
    except RuntimeError as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"JAX finds no device ({reason}): JAX_PLATFORMS is {asked!r}; unset it, or name cpu"
        ) from None
