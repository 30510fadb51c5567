"""Token rows of several sequences one after another in one row, so that only their sum needs room and not each of them."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from estimators.base import Layout, TokenRows
from unet.ops import Implementation
from unet.ops.rows import pick_rows

Rows = TypeVar("Rows")
"""Any tree of arrays that begin `batch length`."""


def fold(rows: Rows, groups: int) -> Rows:
    """The sequences of each of `groups` of neighbours one after another: `batch length …` to `groups size·length …`.

    Raises `ValueError` where `groups` does not divide the batch.
    """

    def join(leaf: Array) -> Array:
        if leaf.shape[0] % groups:
            raise ValueError(f"{leaf.shape[0]} sequences are not {groups} groups of equal size")
        return leaf.reshape(groups, -1, *leaf.shape[2:])

    return jax.tree.map(join, rows)


def unfold(rows: Rows, batch: int) -> Rows:
    """`fold` undone: `groups size·length …` to `batch length …`."""
    return jax.tree.map(lambda leaf: leaf.reshape(batch, -1, *leaf.shape[2:]), rows)


def fold_layout(layout: Layout, groups: int) -> Layout:
    """A layout folded, with documents numbered so that no two sequences share a number."""
    batch = layout.segments.shape[0]
    numbered = layout.segments * batch + jnp.arange(batch, dtype=jnp.int32)[:, None]
    return fold(dataclasses.replace(layout, segments=numbered), groups)


class Squares(eqx.Module):
    """How attention takes folded rows apart again: a query looks at the rows of its own sequence alone, so that this is the
    only work in which every sequence has as many rows as the longest may need.

    `index`: the folded row of each row of each sequence, -1 where there is none; `back`: the other way round, with the
    sequences of a group counted through; `number`: what number a folded row has in its own sequence.
    """

    index: Int[Array, "groups size*rows"]
    back: Int[Array, "groups tokens"]
    number: Int[Array, "groups tokens"]
    size: int = eqx.field(static=True)
    implementation: Implementation | None = eqx.field(static=True)

    def __init__(
        self,
        rows: TokenRows,
        lengths: Int[Array, " batch"],
        *,
        length: int,
        capacity: int,
        implementation: Implementation | None,
    ):
        """`rows` were made of folded sequences of `length` rows, of which each left `lengths` of them, `capacity` at most."""
        groups, tokens = rows.positions.shape
        counts = lengths.reshape(groups, -1)
        first = jnp.cumsum(counts, axis=1) - counts
        place = jnp.arange(capacity, dtype=jnp.int32)
        index = jnp.where(place < counts[..., None], first[..., None] + place, -1)
        sequence = rows.positions // length
        self.index = index.reshape(groups, -1)
        self.number = jnp.arange(tokens, dtype=jnp.int32) - jnp.take_along_axis(first, sequence, axis=1)
        self.back = jnp.where(rows.mask, sequence * capacity + self.number, -1)
        self.size = counts.shape[1]
        self.implementation = implementation

    def apart(self, folded: Float[Array, "groups tokens dim"]) -> Float[Array, "batch rows dim"]:
        """Each sequence in rows of its own, zero where it has none."""
        return self._cut(pick_rows(folded, self.index, self.back, self.implementation))

    def together(self, rows: Float[Array, "batch rows dim"]) -> Float[Array, "groups tokens dim"]:
        """The folded rows again."""
        joint = rows.reshape(self.index.shape[0], -1, rows.shape[-1])
        return pick_rows(joint, self.back, self.index, self.implementation)

    def layout(self, layout: Layout) -> Layout:
        """That of the rows taken apart."""

        def pick(values: Shaped[Array, "groups tokens"]) -> Shaped[Array, "batch rows"]:
            return self._cut(jnp.take_along_axis(values, jnp.maximum(self.index, 0), axis=1, mode="clip"))

        return dataclasses.replace(jax.tree.map(pick, layout), mask=self._cut(self.index >= 0))

    def _cut(self, rows: Array) -> Array:
        return rows.reshape(rows.shape[0] * self.size, -1, *rows.shape[2:])
