"""On which devices a run works, and how batches and parameters lie on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from experiments.config.errors import ConfigError, require
from experiments.config.settings import RunConfig
from unet import fused_attention
from unet.ops.mosaic import refusal

ON_ONE_DEVICE = "they run on one device only: add --devices 1"

Tree = TypeVar("Tree", bound=PyTree[Array])


@dataclass(frozen=True)
class Placement:
    """Sequences of a batch divided among devices (`by_row`), everything else on each of them (`everywhere`)."""

    by_row: NamedSharding
    everywhere: NamedSharding

    @classmethod
    def of(cls, config: RunConfig) -> Placement:
        """That of a run. Raises `ConfigError` where its devices are not there or cannot share a batch."""
        part = config.batch // config.optimizer.accumulate
        available = jax.devices()
        count = device_count(config)
        require(
            count <= len(available) and part % count == 0,
            f"--devices {count} cannot share a batch of {part}: it must divide it, and there are {len(available)} device(s)",
        )
        mesh = jax.make_mesh((count,), ("batch",), axis_types=(AxisType.Auto,), devices=available[:count])
        return cls(NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec()))

    def inputs(self, inputs: Mapping[str, PyTree[np.ndarray]]) -> dict[str, PyTree[Array]]:
        """What a model reads of a batch (`AbstractLanguageModel.inputs`), on the devices."""
        return jax.device_put(dict(inputs), self.by_row)

    def replicated(self, tree: Tree) -> Tree:
        """A tree on each of the devices."""
        return jax.device_put(tree, self.everywhere)


def device_count(config: RunConfig) -> int:
    """The devices asked for, or else as many as can share a batch evenly."""
    if config.devices is not None:
        return config.devices
    part = config.batch // config.optimizer.accumulate
    return max(n for n in range(1, len(jax.devices()) + 1) if part % n == 0)


def with_implementation(config: RunConfig) -> RunConfig:
    """The run with ragged operations and attention in XLA where its batch is spread over devices, which kernels cannot be.

    Raises `ConfigError` where kernels were asked for by name and cannot run.
    """
    config = _with_attention(config)
    implementation, spread = config.unet.implementation, device_count(config) > 1
    if implementation == "pallas":
        refused = "there is no CUDA device" if jax.default_backend() != "gpu" else None
        refused = refused or refusal(config.unet.widths[0], jnp.dtype(config.unet.compute))
        refused = refused or (ON_ONE_DEVICE if spread else None)
        if refused:
            raise ConfigError(f"--unet.implementation pallas: kernels cannot run here: {refused}")
    if implementation is None and spread:
        return dataclasses.replace(config, unet=dataclasses.replace(config.unet, implementation="xla"))
    return config


def _with_attention(config: RunConfig) -> RunConfig:
    form, spread = config.unet.attention_form, device_count(config) > 1
    if form == "tokamax":
        dtype = jnp.dtype(config.unet.compute)
        refused = (fused_attention.refusal(config.length, *one, dtype) for one in config.unet.attention_layers)
        lacks = next(filter(None, refused), None) or (ON_ONE_DEVICE if spread else None)
        if lacks:
            raise ConfigError(f"--unet.attention tokamax: its kernels cannot run here: {lacks}")
        # The model itself may run anywhere.
        return dataclasses.replace(config, unet=dataclasses.replace(config.unet, attention="auto"))
    if form == "auto" and spread:
        return dataclasses.replace(config, unet=dataclasses.replace(config.unet, attention="xla"))
    return config


def attention_notes(config: RunConfig) -> list[str]:
    """Says so where a GPU could attend in fused kernels and does not."""
    lacks = fused_attention.missing()
    if jax.default_backend() != "gpu" or config.unet.attention_form != "auto" or lacks is None:
        return []
    return [f"attention runs in XLA, which moves several times as much memory as fused kernels would: {lacks}"]
