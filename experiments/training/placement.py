"""On which devices a run works, and how batches and parameters lie on them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from estimators.base import has_gradient
from estimators.sharding import BATCH_AXES
from experiments.config.errors import ConfigError, require
from experiments.config.settings import RunConfig
from experiments.reporting.markdown import table
from experiments.training.sharding import (
    AXES,
    Leaf,
    PlacedLeaf,
    assembled,
    local,
    on_host,
    partition_specs,
    placed_leaves,
)
from unet import fused_attention
from unet.language_model import AbstractLanguageModel
from unet.ops.mosaic import refusal

Tree = TypeVar("Tree", bound=PyTree[Array])
Rows = TypeVar("Rows", bound=PyTree)

ModelOf = Callable[[PyTree[Array]], AbstractLanguageModel]
"""The model that some parameters belong to."""
NOT_OF_THE_BATCH = (
    "the loss or a metric of this model is that of the sequences of one device, not of the batch: in a class of your own, take "
    "means with estimators.equations.masked_mean, or sums with estimators.sharding.batch_sum; or run with --devices 1"
)

Gradient = Callable[..., tuple[PyTree[Array], PyTree[Array]]]
"""Of a `ModelOf`, parameters, a batch, and more: the gradient in the parameters, and more."""


@dataclass(frozen=True)
class Placement:
    """A mesh over devices of all processes, with the axes `AXES`. The `batch` sequences of a step are divided over `data` and
    `fsdp`, parameters and moments as `sharding.partition_spec` says."""

    mesh: Mesh
    batch: int
    whole_below: int

    @classmethod
    def of(cls, config: RunConfig, devices: Sequence[jax.Device] | None = None) -> Placement:
        """That of a run on the first of `devices` (None: those of all processes). Raises `ConfigError` where they are too few or
        cannot share a batch."""
        available = jax.devices() if devices is None else devices
        shape = mesh_shape(config, len(available))
        chosen = np.asarray(available[: math.prod(shape)]).reshape(shape)
        mesh = Mesh(chosen, AXES, axis_types=(AxisType.Auto,) * len(AXES))
        return cls(mesh, config.batch, config.mesh.whole_below)

    @property
    def by_row(self) -> NamedSharding:
        """Arrays whose first axis is the batch."""
        return NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))

    @property
    def batch_shards(self) -> int:
        """The parts that the sequences of a batch are divided into."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    @property
    def everywhere(self) -> NamedSharding:
        """Arrays that every device has whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def own_rows(self) -> slice:
        """Which of the `batch` sequences of a step this process has to give to `inputs`."""
        indices = self.by_row.addressable_devices_indices_map((self.batch,)).values()
        bounds = [index[0].indices(self.batch)[:2] for index in indices if index is not None]
        return slice(min(start for start, _ in bounds), max(stop for _, stop in bounds))

    def inputs(self, inputs: Mapping[str, PyTree[np.ndarray]]) -> dict[str, PyTree[Array]]:
        """What a model reads of a batch (`AbstractLanguageModel.inputs`), on the devices. Each process gives its `own_rows`."""

        def placed(rows: np.ndarray) -> Array:
            own = self.own_rows
            whole = (rows.shape[0] * self.batch // (own.stop - own.start), *rows.shape[1:])
            return jax.make_array_from_process_local_data(self.by_row, np.asarray(rows), whole)

        return jax.tree.map(placed, dict(inputs))

    def rows(self, tree: Rows) -> Rows:
        """Arrays with a row for each sequence of a batch of any size, on the devices that share it. Every process gives all."""

        return jax.tree.map(lambda rows: _from_host(np.asarray(rows), self.by_row), tree)

    def own_part(self, rows: np.ndarray) -> np.ndarray:
        """Of rows for a whole batch those of this process."""
        own, each = self.own_rows, rows.shape[0] // self.batch
        return rows[own.start * each : own.stop * each]

    def by_sequence(self, gradient: Gradient, static: AbstractLanguageModel) -> Gradient:
        """`gradient`, run on each device with its own sequences and with its own parts of the parameters. What it returns beside
        the gradient must be the same everywhere; `ConfigError` where it is not."""

        def run(
            params: PyTree[Array], batch: PyTree[Array], *others: PyTree[Array]
        ) -> tuple[PyTree[Array], PyTree[Array]]:
            specs, same = self.specs(params), PartitionSpec()

            def model(parts: PyTree[Array]) -> AbstractLanguageModel:
                return assembled(parts, static, specs)

            taken = specs, PartitionSpec(BATCH_AXES), *[same] * len(others)
            on_each = functools.partial(gradient, model)
            run_on_each = jax.shard_map(on_each, mesh=self.mesh, in_specs=taken, out_specs=(specs, same))
            try:
                return run_on_each(params, batch, *others)
            except ValueError as error:
                if "require replication" in str(error):
                    raise ConfigError(NOT_OF_THE_BATCH) from error
                raise

        return run

    @property
    def alone(self) -> bool:
        """Whether there is one device."""
        return self.mesh.size == 1

    def specs(self, tree: PyTree) -> PyTree[PartitionSpec]:
        """How the leaves of a tree of parameters or moments are divided."""
        return partition_specs(tree, self.mesh.shape, self.whole_below)

    def shardings(self, tree: PyTree) -> PyTree[NamedSharding]:
        """The same as shardings."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.specs(tree))

    def kept(self, tree: Tree) -> Tree:
        """Within a compiled step: a tree of parameters or moments that stays where it lies. The compiler might choose otherwise,
        and the next step would be compiled again."""
        return tree if self.alone else jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def model_kept(self, model: AbstractLanguageModel) -> AbstractLanguageModel:
        """The same for a model that is being built: what has no gradient is whole on each device."""
        if self.alone:
            return model

        def whole(leaf: Leaf) -> Leaf | Array:
            return jax.lax.with_sharding_constraint(leaf, self.everywhere) if eqx.is_array(leaf) else leaf

        params, rest = eqx.partition(model, has_gradient)
        return eqx.combine(self.kept(params), jax.tree.map(whole, rest))

    def with_local_rest(self, model: AbstractLanguageModel) -> AbstractLanguageModel:
        """A model made by `model_kept`, of which what has no gradient can be used by this process without the others."""
        params, rest = eqx.partition(model, has_gradient)
        return eqx.combine(params, jax.tree.map(local, rest))

    def divided(self, tree: Tree) -> Tree:
        """A tree of parameters or moments on the devices. Every process gives the same, or all of them arrays that lie so."""

        def placed(leaf: Array, sharding: NamedSharding) -> Array:
            if jax.process_count() == 1:
                return jax.device_put(leaf, sharding)
            if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
                return leaf
            return _from_host(np.asarray(leaf), sharding)

        return jax.tree.map(placed, tree, self.shardings(tree))

    def whole(self, tree: Tree) -> PyTree[np.ndarray]:
        """A tree on the host, gathered leaf by leaf. Every process has to call this, and gets it."""
        return jax.tree.map(on_host, tree)

    def leaves(self, tree: PyTree) -> list[PlacedLeaf]:
        """What one device holds of each leaf of a tree of parameters or moments."""
        return placed_leaves(tree, self.mesh.shape, self.whole_below)

    def shown(self, tree: PyTree) -> str:
        """How a tree of parameters lies on the devices: each leaf, and the totals (Markdown)."""
        leaves = self.leaves(tree)
        rows = [(f"`{one.path}`", _times(one.shape), str(tuple(one.spec)), one.bytes_per_device) for one in leaves]
        whole, each = (sum(getattr(one, name) for one in leaves) for name in ("bytes", "bytes_per_device"))
        mesh = " × ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        total = f"mesh {mesh}: {each} of {whole} bytes of parameters on each device"
        return f"{table(['parameter', 'shape', 'divided over', 'bytes per device'], rows)}\n{total}\n"


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "1"


def mesh_shape(config: RunConfig, available: int) -> tuple[int, int, int]:
    """The sizes of the axes of a run's mesh, of the devices that are `available`. Raises `ConfigError` where they are too few, or
    cannot share a batch."""
    mesh, part = config.mesh, config.batch // config.optimizer.accumulate
    inside = config.mesh.fsdp * config.mesh.tensor
    axes = f"--mesh.fsdp {mesh.fsdp}" + (f" x --mesh.tensor {mesh.tensor}" if mesh.tensor > 1 else "")
    if config.devices is not None:
        require(
            config.devices % inside == 0 and mesh.data in (-1, config.devices // inside),
            f"--devices {config.devices} are not --mesh.data {mesh.data} x {axes}: leave one of them out",
        )
    data = mesh.data if config.devices is None else config.devices // inside
    if data == -1:
        require(inside <= available, f"{axes} are {inside} devices, and there are {available}")
        fitting = [n for n in range(1, available // inside + 1) if part % (n * mesh.fsdp) == 0]
        require(bool(fitting), f"{axes} cannot share a batch of {part}: --mesh.fsdp must divide it")
        data = max(fitting)
    count = data * inside
    asked = f"--devices {count}" if config.devices is not None else f"--mesh.data {data} x {axes}"
    require(
        count <= available and part % (data * mesh.fsdp) == 0,
        f"{asked} cannot share a batch of {part}: it must divide it, and there are {available} device(s)",
    )
    require(
        jax.process_count() == 1 or count == available,
        f"{asked} leave {available - count} devices idle, of which a process may have no other: use all {available}",
    )
    return data, mesh.fsdp, mesh.tensor


def batch_shards(config: RunConfig) -> int:
    """The parts that the sequences of a batch are divided into."""
    mesh = config.mesh
    data = mesh_shape(config, len(jax.devices()))[0] if mesh.data == -1 else mesh.data
    return data * mesh.fsdp


def step_devices(config: RunConfig) -> int:
    """The devices that share a step."""
    return batch_shards(config) * config.mesh.tensor


def with_implementation(config: RunConfig) -> RunConfig:
    """The run as its model is built: one that was asked to attend in fused kernels may run anywhere once it is trained.

    Raises `ConfigError` where kernels were asked for by name and cannot run.
    """
    if config.unet.implementation == "pallas":
        refused = "there is no CUDA device" if jax.default_backend() != "gpu" else None
        refused = refused or refusal(config.unet.widths[0], jnp.dtype(config.unet.compute))
        if refused:
            raise ConfigError(f"--unet.implementation pallas: kernels cannot run here: {refused}")
    if config.unet.attention_form != "tokamax":
        return config
    dtype = jnp.dtype(config.unet.compute)
    reasons = (fused_attention.refusal(config.length, *one, dtype) for one in config.unet.attention_layers)
    if lacks := next(filter(None, (*reasons, _shared(config))), None):
        raise ConfigError(f"--unet.attention tokamax: its kernels cannot run here: {lacks}")
    return dataclasses.replace(config, unet=dataclasses.replace(config.unet, attention="auto"))


def _shared(config: RunConfig) -> str | None:
    """Why several devices have no fused attention; None if there is one."""
    return None if step_devices(config) == 1 else fused_attention.SEVERAL


def _from_host(whole: np.ndarray, sharding: NamedSharding) -> Array:
    """An array on the devices, which every process has whole."""
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def attention_notes(config: RunConfig) -> list[str]:
    """Says so where a GPU could attend in fused kernels and does not."""
    lacks = fused_attention.missing() or (None if fused_attention.unable() else _shared(config))
    if jax.default_backend() != "gpu" or config.unet.attention_form != "auto" or lacks is None:
        return []
    return [f"attention runs in XLA, which moves several times as much memory as fused kernels would: {lacks}"]
