"""Published parameters as pieces of a model's arrays: reading and writing them one at a time.

In the layouts of `transformers` a matrix is the transpose of ours, and queries, keys and values, or gates and values, are
parameters of their own.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from unet.attention import Attention
from unet.blocks import PreNorm
from unet.files.arrays import rows_of, shape_in
from unet.files.converted import WeightType, fill, require_names, require_shape
from unet.files.errors import LayoutError
from unet.layers import Affine, LayerNorm, Linear, ScaleNorm, SwiGLU

HEAD = "lm_head.weight"
"""The name of the output head, of one array with that of the embedding if they are tied."""
PREFIX = "model."
"""What all names but that of the head begin with."""

Leaf = Array | jax.ShapeDtypeStruct
Order = Int[np.ndarray, " rows"]
Tree = TypeVar("Tree", bound=PyTree)


@dataclass(frozen=True)
class Piece:
    """A published parameter, or `rows` of it, and its place in a `leaf`: some of the `columns` of a matrix, which is stored as
    the transpose, or all of a leaf that is stored as published. Row i here is row `order[i]` there. `shape` is that of the
    whole published parameter."""

    name: str
    leaf: Leaf
    shape: tuple[int, ...]
    columns: slice | None = None
    order: Order | None = None
    rows: slice | None = None

    @property
    def size(self) -> int:
        """The number of weights in it."""
        return math.prod(self.shape) if self.rows is None else self.leaf.size

    def read(self, params: Mapping[str, np.ndarray], name: str, into: np.ndarray) -> None:
        """Fill this piece of a leaf. Raises `LayoutError` for what are no weights."""
        value = params[name] if self.rows is None else rows_of(params, name, self.rows)
        value = value if self.order is None else value[self.order]
        fill(self.name, value, into if self.columns is None else into[:, self.columns].T)

    def written(self) -> np.ndarray:
        """The published parameter, or the rows of it."""
        assert isinstance(self.leaf, jax.Array)
        value = np.asarray(self.leaf)
        value = value if self.columns is None else value[:, self.columns].T
        return np.ascontiguousarray(value if self.order is None else value[np.argsort(self.order)])


def filled(
    skeleton: Tree,
    pieces: Sequence[Piece],
    params: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    dtype: WeightType,
) -> Tree:
    """`skeleton` with the arrays that `pieces` describe, read from `params` by `names`, in `dtype`. Pieces of one leaf follow
    each other. Raises `LayoutError` for another shape or dtype."""
    weights: dict[int, Array] = {}
    for _, group in itertools.groupby(pieces, key=lambda piece: id(piece.leaf)):
        own = list(group)
        leaf = own[0].leaf
        # Before there is room for it: a configuration may ask for any.
        for piece in own:
            require_shape(piece.name, shape_in(params, names[piece.name]), piece.shape)
        array = np.empty(leaf.shape, jnp.dtype(dtype))
        for piece in own:
            piece.read(params, names[piece.name], array)
        # Wait, or pending copies would pile up in memory.
        weights[id(leaf)] = jax.block_until_ready(jnp.asarray(array))
    return jax.tree.map(lambda leaf: weights.get(id(leaf), leaf), skeleton)


def sources(
    pieces: Iterable[Piece],
    params: Mapping[str, np.ndarray],
    embedding: str,
    *,
    tied: bool,
    prefix: str = PREFIX,
    ignored: re.Pattern[str] | None = None,
) -> dict[str, str]:
    """The name in `params` of each published parameter; `embedding` is that of the embedding, all names but that of the head
    begin with `prefix`, and those that `ignored` finds are no parameters. If embeddings are `tied`, the embedding may be given by
    its own name, as the head, or as both.

    Raises `LayoutError` for missing and unknown names, and for a tied head that differs from the embedding.
    """
    # What reads files takes off a prefix that all names have, as those of a tied model without its head do.
    short = not any(name.startswith(prefix) for name in params)
    names = {piece.name: piece.name.removeprefix(prefix) if short else piece.name for piece in pieces}
    given = {name for name in params if ignored is None or not ignored.search(name)}
    if tied:
        own = names[embedding]
        if own in given and HEAD in given and not np.array_equal(params[own], params[HEAD]):
            raise LayoutError(
                f"tie_word_embeddings is true, but {HEAD} is not equal to {own}: give only one of them, or set it to false"
            )
        if own not in given:
            names[embedding] = HEAD
        else:
            given -= {HEAD}
    require_names(names.values(), given)
    return names


class PieceParams(Mapping[str, np.ndarray]):
    """The parameters of a model by their published names and in their published shapes, each converted when it is read; a tied
    head is there as a second name of the `embedding`."""

    def __init__(self, pieces: Iterable[Piece], embedding: str, *, tied: bool):
        self._pieces: dict[str, list[Piece]] = {}
        for piece in pieces:
            self._pieces.setdefault(piece.name, []).append(piece)
        if tied:
            self._pieces[HEAD] = self._pieces[embedding]

    def __getitem__(self, name: str) -> np.ndarray:
        parts = [piece.written() for piece in self._pieces[name]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def size(self, name: str) -> int:
        """The size of a parameter in bytes."""
        return sum(piece.size * piece.leaf.dtype.itemsize for piece in self._pieces[name])


def rows(name: str, leaf: Leaf, order: Order | None = None) -> Piece:
    """An array that is stored as published, but for the `order` of its rows."""
    return Piece(name, leaf, tuple(leaf.shape), order=order)


def vector(name: str, norm: ScaleNorm | LayerNorm | None) -> Piece:
    """The scale of a norm."""
    assert norm is not None
    return rows(name, norm.weight)


def matrix(name: str, layer: Linear | Affine, order: Order | None = None, columns: slice = slice(None)) -> Piece:
    """Some `columns` of the matrix of a layer, which is published as the transpose."""
    inputs, outputs = layer.weight.shape
    count = len(range(*columns.indices(outputs)))
    return Piece(name, layer.weight, (count, inputs), columns, order)


def gated_layer(
    name: str,
    block: PreNorm,
    mixer: Attention,
    mlp: SwiGLU,
    orders: Sequence[Int[np.ndarray, " _"] | None] = (None, None, None),
) -> Iterator[Piece]:
    """A layer with attention and a gated MLP, as Llama and the Byte Latent Transformer publish it. `orders`: of the rows of
    queries, keys and values."""
    inner, shared = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    ends = (0, inner, inner + shared, inner + 2 * shared)
    for part, order, columns in zip("qkv", orders, itertools.starmap(slice, itertools.pairwise(ends)), strict=True):
        yield matrix(f"{name}.self_attn.{part}_proj.weight", mixer.qkv, order, columns)
    yield matrix(f"{name}.self_attn.o_proj.weight", mixer.out)
    hidden = mlp.out.weight.shape[0]
    yield matrix(f"{name}.mlp.up_proj.weight", mlp.value_gate, columns=slice(0, hidden))
    yield matrix(f"{name}.mlp.gate_proj.weight", mlp.value_gate, columns=slice(hidden, 2 * hidden))
    yield matrix(f"{name}.mlp.down_proj.weight", mlp.out)
    yield vector(f"{name}.input_layernorm.weight", block.before_mixer)
    yield vector(f"{name}.post_attention_layernorm.weight", block.before_mlp)
