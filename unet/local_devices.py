"""Batches whose rows are computed on all devices of this process.

What a model makes of a text depends on no other text of its batch. So each device computes some of the rows, with the whole
model, and nothing is exchanged between them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Concatenate, Literal, ParamSpec, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

ROWS = "rows"
"""The axis over which rows are divided that have nothing to do with each other."""

Tree = TypeVar("Tree", bound=PyTree)
Model = TypeVar("Model", bound=PyTree)
Result = TypeVar("Result", bound=PyTree)
Leaf = TypeVar("Leaf")
Parameters = ParamSpec("Parameters")


@dataclass(frozen=True)
class LocalDevices:
    """Devices that share the rows of a batch, each as many; `mesh` is None where one device computes all."""

    mesh: Mesh | None

    @classmethod
    def of(cls, rows: int, model: PyTree, axis: str = ROWS) -> LocalDevices:
        """As many of the devices that may compute with `model` as divide `rows` into equal parts.

        `axis`: the name of the mesh's axis. With `estimators.sharding.DATA` what is said of a batch is true of all rows, such as
        the numbers that one key draws; with `ROWS` each device takes its rows for the batch.
        """
        available = usable_devices(model)
        count = sharing(rows, len(available))
        return cls(Mesh(np.asarray(available[:count]), (axis,), axis_types=(AxisType.Auto,)) if count > 1 else None)

    def rows(self, arrays: Tree) -> Tree:
        """A tree of arrays that have a row for each row of the batch, on the devices that compute them."""
        return arrays if self.mesh is None else jax.device_put(arrays, NamedSharding(self.mesh, _by_row(self.mesh)))

    def everywhere(self, tree: Tree) -> Tree:
        """A tree, such as a model, of which each device has all arrays; where one device computes, its own of those that several
        have."""
        if self.mesh is None:
            return jax.tree.map(_on_the_first, tree)
        arrays, rest = eqx.partition(tree, eqx.is_array)
        return eqx.combine(jax.device_put(arrays, NamedSharding(self.mesh, PartitionSpec())), rest)


def on_all_devices(model: Tree) -> Tree:
    """`model` with all of its arrays on every device of this process, where they lie on the first or on all of them already.

    Scores, generation and boundaries copy a model to the other devices at each call; of such a model nothing is copied where all
    devices share the batch.
    """
    return LocalDevices.of(len(usable_devices(model)), model).everywhere(model)


def sharing(rows: int, devices: int) -> int:
    """How many of so many devices share `rows` evenly: as many as possible."""
    return max((count for count in range(1, min(rows, devices) + 1) if rows % count == 0), default=1)


def usable_devices(model: PyTree) -> Sequence[jax.Device]:
    """The devices that may compute with a model: all of this process, where its arrays lie on the first or on all of them. A
    model that was put elsewhere or divided stays there, and so do all where a default device is named: then there are none."""
    local = jax.local_devices()
    if jnp.zeros(()).devices() != {local[0]}:
        return []
    for leaf in jax.tree.leaves(model):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            where = leaf.sharding.device_set
            copied = len(where) > 1 and leaf.is_fully_replicated and where <= set(local)
            if where != {local[0]} and not copied:
                return []
    return local


def by_row(
    function: Callable[Concatenate[Model, Parameters], Result],
    *,
    donate: Literal["none", "all-except-first"] = "none",
) -> Callable[Concatenate[Model, Parameters], Result]:
    """`function` compiled, as by `equinox.filter_jit`. Its first argument is a model, or a module that holds one. Every other
    array has a row for each row of the batch, but single numbers and keys, which are the same for all; so has every array of its
    result. Where rows lie on `LocalDevices`, each device computes its own. All arguments are given by position."""
    compiled = eqx.filter_jit(function, donate=donate)

    @eqx.filter_jit(donate=donate)
    def divided(whole: tuple[Mesh, Model], *arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        mesh, model = whole
        arrays, rest = eqx.partition((model, arguments), eqx.is_array)

        def own(*parts: PyTree) -> Result:
            own_model, own_arguments = eqx.combine(parts, rest)
            return function(own_model, *own_arguments, **named)

        by_row = _by_row(mesh)
        specs = PartitionSpec(), jax.tree.map(lambda array: by_row if array.ndim else PartitionSpec(), arrays[1])
        # There is no gradient, for which JAX would have to know what varies over the devices.
        return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=by_row, check_vma=False)(*arrays)

    @functools.wraps(function)
    def run(model: Model, *arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        if named:
            raise TypeError("arguments of a function by rows are given by position")
        mesh = _mesh_of(arguments)
        if mesh is None:
            return compiled(model, *arguments, **named)
        return divided((mesh, model), *arguments, **named)

    return run


def _on_the_first(leaf: Leaf) -> Leaf | Array:
    """An array that lies on several devices as it is on the first; anything else as it is."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return leaf
    copied = len(leaf.sharding.device_set) > 1 and leaf.is_fully_replicated and leaf.is_fully_addressable
    return leaf.addressable_data(0) if copied else leaf


def _by_row(mesh: Mesh) -> PartitionSpec:
    return PartitionSpec(mesh.axis_names[0])


def _mesh_of(rows: PyTree) -> Mesh | None:
    """The mesh that rows are divided over; None where they lie on one device."""
    for leaf in jax.tree.leaves(rows):
        sharding = leaf.sharding if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) else None
        if (
            isinstance(sharding, NamedSharding)
            and isinstance(sharding.mesh, Mesh)
            and sharding.spec == _by_row(sharding.mesh)
        ):
            return sharding.mesh
    return None
