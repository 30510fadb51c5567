"""Attention and MLPs that the devices along `TENSOR` share: each has some of the heads and of the inner units.

As in Shoeybi et al. 2019, "Megatron-LM", section 3. Every device has the same sequences. The first product of a layer gives each
its own heads or inner units, the second one a summand of the output: one sum over devices for each layer and pass. All else is
computed on every device: also Mamba-2, mixtures of experts and attention to tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from estimators.sharding import TENSOR
from unet.attention import Attention
from unet.layers import GeGLU, Linear, SwiGLU, with_fields

Tree = TypeVar("Tree", bound=PyTree)

SHARED = (
    r"\.(attention|mixer)\.(qkv|out)\.weight$",
    r"\.mlp\.(gate_up|down|value_gate|out)\.weight$",
)
"""The paths of the parameters that belong to shared layers, as regular expressions."""


def is_shared(path: str) -> bool:
    """Whether the parameter at this path belongs to a layer that devices share."""
    return any(re.search(one, path) for one in SHARED)


class SummedLinear(eqx.Module):
    """A `Linear` layer whose inputs devices share: the sum of their products."""

    weight: Float[Array, "inputs outputs"]

    def __call__(self, x: Float[Array, "*shape inputs"]) -> Float[Array, "*shape outputs"]:
        return jax.lax.psum(x @ self.weight.astype(x.dtype), TENSOR)


def shared(tree: Tree) -> Tree:
    """A tree of modules in which this device has its part of every shared layer; itself where no axis `TENSOR` is of several
    devices. Raises `ValueError` where these do not divide the heads or inner units."""
    if TENSOR not in jax.sharding.get_abstract_mesh().manual_axes or jax.lax.axis_size(TENSOR) == 1:
        return tree
    require_divisible(tree, jax.lax.axis_size(TENSOR))
    return jax.tree.map(lambda node: _part(node) if _is_shared(node) else node, tree, is_leaf=_is_shared)


def require_divisible(tree: PyTree, parts: int) -> None:
    """Raise `ValueError`, naming the layer, where so many devices cannot share the layers of a tree of modules. Attention with
    biases (GPT-2) they never can."""
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_shared):
        if isinstance(node, Attention):
            if not isinstance(node.qkv, Linear):
                raise ValueError(f"devices cannot share {jax.tree_util.keystr(path)}, which has biases")
            sizes = {"heads": node.heads, "heads of keys and values": node.kv_heads}
        elif isinstance(node, GeGLU | SwiGLU):
            sizes = {"inner units": (node.down if isinstance(node, GeGLU) else node.out).weight.shape[0]}
        else:
            continue
        for what, size in sizes.items():
            if size % parts:
                raise ValueError(f"{parts} devices cannot share the {size} {what} of {jax.tree_util.keystr(path)}")


def _is_shared(node: object) -> bool:
    return isinstance(node, Attention | GeGLU | SwiGLU)


def _part(layer: Attention | GeGLU | SwiGLU) -> Attention | GeGLU | SwiGLU:
    parts = jax.lax.axis_size(TENSOR)
    if isinstance(layer, Attention):
        assert isinstance(layer.qkv, Linear)
        assert isinstance(layer.out, Linear)
        inner, each = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        return with_fields(
            layer,
            qkv=_columns(layer.qkv, (inner, inner + each)),
            out=_rows(layer.out),
            heads=layer.heads // parts,
            shared_heads=None if layer.shared_heads is None else layer.shared_heads // parts,
        )
    if isinstance(layer, GeGLU):
        half = layer.down.weight.shape[0]
        return with_fields(layer, gate_up=_columns(layer.gate_up, (half,)), down=_rows(layer.down))
    half = layer.out.weight.shape[0]
    return with_fields(layer, value_gate=_columns(layer.value_gate, (half,)), out=_rows(layer.out))


def _columns(layer: Linear, bounds: Sequence[int]) -> Linear:
    """This device's outputs of each of the parts that `bounds` cut the outputs into."""
    parts = jnp.split(layer.weight, bounds, axis=1)
    return Linear.of(jnp.concatenate([_own(part, 1) for part in parts], axis=1))


def _rows(layer: Linear) -> SummedLinear:
    """This device's inputs."""
    return SummedLinear(_own(layer.weight, 0))


def _own(weight: Float[Array, "inputs outputs"], axis: int) -> Float[Array, "some_inputs some_outputs"]:
    size = weight.shape[axis] // jax.lax.axis_size(TENSOR)
    first: Int[Array, ""] = jax.lax.axis_index(TENSOR) * size
    return jax.lax.dynamic_slice_in_dim(weight, first, size, axis)
