"""Where each parameter lies on a mesh: the one rule, and what it makes of a tree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from estimators.sharding import DATA, FSDP, TENSOR
from unet.blocks import DividedBlock, Stack
from unet.gathering import Division, whole_leaf
from unet.language_model import AbstractLanguageModel
from unet.tensor import is_shared

AXES = (DATA, FSDP, TENSOR)
"""The axes of every mesh."""

Params = TypeVar("Params", bound=PyTree)
Leaf = TypeVar("Leaf")


def partition_spec(path: str, shape: Sequence[int], mesh: Mapping[str, int], whole_below: int) -> PartitionSpec:
    """The rule: of a leaf of at least `whole_below` numbers, the largest axis that `fsdp` divides is divided over it, the first
    of several as large; for the weights of layers that `tensor` shares, over both where their product divides one. Every other
    leaf is whole on each device.

    `path` names the leaf, as `jax.tree_util.keystr` does; `mesh` has the size of each axis of the mesh.
    """
    if math.prod(shape) < whole_below:
        return PartitionSpec()
    for axes in ((FSDP, TENSOR), (FSDP,)) if is_shared(path) else ((FSDP,),):
        over = tuple(name for name in axes if mesh[name] > 1)
        parts = math.prod(mesh[name] for name in over)
        fitting = [axis for axis, size in enumerate(shape) if size % parts == 0]
        if parts > 1 and fitting:
            largest = max(fitting, key=lambda axis: shape[axis])
            return PartitionSpec(*[None] * largest, over[0] if len(over) == 1 else over)
    return PartitionSpec()


def partition_specs(tree: PyTree, mesh: Mapping[str, int], whole_below: int) -> PyTree[PartitionSpec]:
    """The spec of each leaf of a tree. Moments of an optimizer have the shapes of their parameters, and so their specs."""

    def spec(path: tuple[object, ...], leaf: Array | jax.ShapeDtypeStruct) -> PartitionSpec:
        return partition_spec(jax.tree_util.keystr(path), leaf.shape, mesh, whole_below)

    return jax.tree_util.tree_map_with_path(spec, tree)


@dataclass(frozen=True)
class PlacedLeaf:
    """A leaf of a tree, its spec, and what one device holds of it."""

    path: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    bytes: int
    bytes_per_device: int


def placed_leaves(tree: PyTree, mesh: Mapping[str, int], whole_below: int) -> list[PlacedLeaf]:
    """Each leaf of a tree of arrays or of their shapes, in order."""
    leaves = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        spec = partition_spec(name, leaf.shape, mesh, whole_below)
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        leaves.append(PlacedLeaf(name, tuple(leaf.shape), spec, size, size // parts_of(spec, mesh)))
    return leaves


def parts_of(spec: PartitionSpec, mesh: Mapping[str, int]) -> int:
    """The number of parts that a spec divides a leaf into."""
    division = division_of(spec)
    return 1 if division is None else math.prod(mesh[name] for name in division[1])


def on_host(leaf: Array | np.ndarray) -> np.ndarray:
    """A leaf on the host, whole: gathered where other processes hold parts of it. Every process has to call this."""
    if isinstance(leaf, np.ndarray) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def local(leaf: Leaf) -> Leaf | Array:
    """A leaf of a model that this process can use without the others: gathered where it lies on several devices. Every process
    has to call this."""
    if isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1:
        return jnp.asarray(on_host(leaf))
    return leaf


def assembled(params: Params, static: AbstractLanguageModel, specs: PyTree[PartitionSpec]) -> AbstractLanguageModel:
    """Inside the `jax.shard_map` of a step: the model of which `params` are the parts on this device. Its blocks are put together
    where they run, everything else here."""

    def outside(node: PyTree, spec: PyTree) -> PyTree:
        if not isinstance(node, Stack):
            return whole_leaf(node, division_of(spec))
        rest = jax.tree.map(outside, node.with_blocks(()), spec.with_blocks(()))
        return rest.with_blocks(node.blocks)

    whole = eqx.combine(jax.tree.map(outside, params, specs, is_leaf=_is_stack), static)
    nodes, structure = jax.tree.flatten(whole, is_leaf=_is_stack)
    specs_of = iter([node.blocks for node in jax.tree.leaves(specs, is_leaf=_is_stack) if _is_stack(node)])
    made = [_with_divided(node, next(specs_of)) if _is_stack(node) else node for node in nodes]
    return jax.tree.unflatten(structure, made)


def _is_stack(node: object) -> bool:
    return isinstance(node, Stack)


def _with_divided(stack: Stack, specs: Sequence[PyTree[PartitionSpec]]) -> Stack:
    blocks = zip(stack.blocks, specs, strict=True)
    return stack.with_blocks(
        [DividedBlock(block, tuple(map(division_of, jax.tree.leaves(spec)))) for block, spec in blocks]
    )


def division_of(spec: PartitionSpec) -> Division:
    """The division that a spec stands for."""
    for axis, names in enumerate(spec):
        if names is not None:
            return axis, (names,) if isinstance(names, str) else tuple(names)
    return None
