"""Whether a training step has to compute the blocks of its model again in the backward pass, for lack of memory.

Decided before anything is compiled, from the arrays that the backward pass needs from the forward pass.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from estimators.base import has_gradient
from estimators.sharding import DATA, FSDP, TENSOR
from experiments.config.settings import RunConfig
from experiments.training.placement import batch_shards, step_devices
from experiments.training.sharding import placed_leaves
from unet import UNet
from unet.blocks import computed
from unet.fused_attention import refusal

GIB = 2**30
CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says how much memory a container or a job may take."""

USABLE = 0.9
"""Share of the memory that is planned with. The rest is for what is not counted: buffers within a block, gaps between arrays."""

KEPT = 1.1
"""What a compiled step holds at most beside parameters, moments and gradients, as a share of the counted arrays: the compiler
computes some of them again, and keeps what is not counted. 0.70 and 0.90 were measured for GPUs, up to 1.09 on a CPU."""

COPIES = 4
"""float32 arrays as large as the parameters: these, their gradient, and two moments."""


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes of the `activations` of a step on one device without recomputation, of its parameters and their moments
    (`state`), and of the `memory` there is (None: unknown)."""

    activations: int
    state: int
    memory: int | None

    @property
    def remat(self) -> bool:
        """Whether blocks are recomputed. Where the memory is unknown, they are."""
        return self.memory is None or self.activations + self.state > USABLE * self.memory

    @property
    def note(self) -> str:
        """What was decided, and why."""
        counted = (
            f"{self.activations / GIB:.1f} GiB of activations and {self.state / GIB:.1f} GiB of parameters and moments"
        )
        if self.memory is None:
            return (
                f"blocks are recomputed in the backward pass: {counted} would be needed otherwise, and it is unknown how much "
                "memory there is (--unet.memory)"
            )
        there = f"{USABLE:.0%} of {self.memory / GIB:.1f} GiB"
        if self.remat:
            return f"blocks are recomputed in the backward pass, since {counted} do not fit into {there}"
        return f"blocks are not recomputed in the backward pass, since {counted} fit into {there}"


def memory_plan(config: RunConfig, model: UNet, capacities: Sequence[int]) -> MemoryPlan:
    """The plan of a training step of this run. `capacities`: the most tokens of each level."""
    parts = config.optimizer.accumulate * batch_shards(config)
    shape = max(1, config.batch // parts), config.length
    params = eqx.filter(model, has_gradient)
    # How many groups share a batch (`DATA`) does not matter to where a parameter lies.
    mesh = {DATA: 1, FSDP: config.mesh.fsdp, TENSOR: config.mesh.tensor}
    state = COPIES * sum(leaf.bytes_per_device for leaf in placed_leaves(params, mesh, config.mesh.whole_below))
    # Where all attention is fused, what XLA would have to keep of it does not count.
    dtype = jnp.dtype(config.unet.compute)
    refused = [refusal(config.length, *one, dtype) for one in config.unet.attention_layers]
    fused = config.unet.attention_form != "xla" and step_devices(config) == 1 and not any(refused)
    model = computed(model, remat=False, attention="tokamax" if fused else "xla")
    return MemoryPlan(activation_bytes(model, shape, capacities, config.samples), state, available(config))


def available(config: RunConfig) -> int | None:
    """Bytes of memory that a step may take on each device: as stated, or what the device has; on a CPU, whose devices share it,
    a part of the machine's. None if it is unknown."""
    if config.unet.memory is not None:
        return round(config.unet.memory * GIB)
    [device, *_] = jax.local_devices()
    stats = device.memory_stats()
    if stats is not None and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform != "cpu":
        return None
    machine = machine_memory()
    devices = step_devices(config) // jax.process_count()
    return None if machine is None else machine // max(1, devices)


def machine_memory() -> int | None:
    """Bytes of memory of this machine, or what its control group allows of it; None if it is unknown."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    for limit in CONTROL_GROUP:
        with contextlib.suppress(OSError, ValueError):
            # "max" where there is none.
            whole = min(whole, int(limit.read_text()))
    return whole


def activation_bytes(model: UNet, shape: tuple[int, int], capacities: Sequence[int], samples: int = 1) -> int:
    """Bytes that the backward pass of a loss on a batch of this `shape` needs from its forward pass: `KEPT` times those of the
    arrays that it takes as inputs. Nothing is computed here."""
    params, static = eqx.partition(model, has_gradient)

    def backward(params: PyTree[Array], bytes: Array, key: Array) -> PyTree[Array]:
        def loss(params: PyTree[Array]) -> Array:
            kept: UNet = eqx.combine(params, static)
            return kept.loss(
                bytes, key=jax.random.wrap_key_data(key), capacities=[(most,) for most in capacities], samples=samples
            ).loss

        return jax.tree.leaves(jax.vjp(loss, params)[1])

    data = jax.ShapeDtypeStruct(shape, jnp.uint8), jax.ShapeDtypeStruct((2,), jnp.uint32)
    needed = jax.tree.leaves(eqx.filter_eval_shape(backward, params, *data))
    return round(KEPT * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in needed))
