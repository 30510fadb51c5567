"""What a token is made of: its last row, or all rows that its boundary closes.

A group is what one boundary closes: the rows after the boundary before, its own row the last. So a token never depends on a row
after the one at which it is first used.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from estimators.base import AbstractChunker, AbstractMemory, Boundaries, Joined, TokenRows, written
from unet.cache import NewRow, RowCache, attend_cached
from unet.cross import CrossLayer
from unet.layers import Linear
from unet.ops import Implementation, downsample
from unet.ops.rows import add_at, bounds_of, spread_rows


class Groups(eqx.Module):
    """Which group each row is in: `index`, `tokens` where no boundary closes it; `upcoming`, the same but for those rows, which
    get that of some other group, so that it never falls; and how many tokens there is room for."""

    index: Int[Array, "batch length"]
    upcoming: Int[Array, "batch length"]
    tokens: int = eqx.field(static=True)

    @property
    def inside(self) -> Bool[Array, "batch length"]:
        """Whether a row is in a group."""
        return self.index < self.tokens

    def total(self, values: Float[Array, "batch length *rest"]) -> Float[Array, "batch tokens *rest"]:
        """The sum of each group."""
        return add_at(self.index, values, self.tokens)

    def largest(self, values: Float[Array, "batch length *rest"]) -> Float[Array, "batch tokens *rest"]:
        """The largest of each group, number by number; -inf where it has no rows."""

        def most(index: Array, values: Array) -> Array:
            empty = jnp.full((self.tokens, *values.shape[1:]), -jnp.inf, values.dtype)
            return empty.at[index].max(values, mode="drop")

        return jax.vmap(most)(self.index, values)

    def spread(self, rows: Float[Array, "batch tokens dim"]) -> Float[Array, "batch length dim"]:
        """What belongs to each group at all its rows; rows of no group get that of another."""
        return spread_rows(rows, self.upcoming, bounds_of(self.upcoming, self.tokens), None)


def groups_of(boundaries: Boundaries, capacity: int) -> Groups:
    """The groups that boundaries close. What a document leaves unclosed belongs to none."""
    closed = boundaries.actions.astype(jnp.int32)
    index = jnp.cumsum(closed, axis=1) - closed
    # Rows of the document before would fall to the boundary at a start, which closes its own row alone.
    last = jnp.flip(jax.lax.cummin(jnp.flip(_next_boundary(boundaries), 1), axis=1), 1)
    inside = jnp.take_along_axis(boundaries.starts, jnp.minimum(last, closed.shape[1] - 1), axis=1)
    stray = inside & ~boundaries.starts
    count = jnp.sum(closed, axis=1, keepdims=True)
    outside = stray | (index >= jnp.minimum(count, capacity))
    return Groups(jnp.where(outside, capacity, index), jnp.minimum(index, capacity - 1), capacity)


def _next_boundary(boundaries: Boundaries) -> Int[Array, "batch length"]:
    """The number of the row where there is a boundary, beyond all rows elsewhere."""
    length = boundaries.actions.shape[1]
    return jnp.where(boundaries.actions, jnp.arange(length, dtype=jnp.int32), length)


def open_rows(boundaries: Boundaries, mask: Bool[Array, "batch length"]) -> Bool[Array, "batch length"]:
    """The rows that no boundary has closed yet, of sequences of one document each."""
    place = jnp.arange(mask.shape[1], dtype=jnp.int32)
    last = jnp.max(jnp.where(boundaries.actions, place, -1), axis=1)
    return (place > last[:, None]) & mask


class AbstractPool(eqx.Module):
    """Makes one row of the rows of a group; row by row, `open` keeps those of the group that is not closed yet."""

    @abstractmethod
    def __call__(
        self, hidden: Float[Array, "batch length dim"], boundaries: Boundaries, capacity: int
    ) -> Float[Array, "batch tokens token_dim"]:
        """One row for each group; what it says of groups that are not there means nothing."""

    @abstractmethod
    def open(
        self, hidden: Float[Array, "batch length dim"], boundaries: Boundaries, mask: Bool[Array, "batch length"]
    ) -> PyTree[Array]:
        """What is kept of the group that no boundary has closed yet."""

    @abstractmethod
    def close(self, hidden: Float[Array, "batch 1 dim"], memory: PyTree[Array]) -> Float[Array, "batch 1 token_dim"]:
        """The row of the group that the next row would close."""

    @abstractmethod
    def advance(
        self, hidden: Float[Array, "batch 1 dim"], boundaries: Boundaries, memory: PyTree[Array]
    ) -> PyTree[Array]:
        """How the memory changes with the next row (see `estimators.base.written`)."""


class Largest(AbstractPool):
    """The largest value of each channel in the group (H-Net fig. 13; BLT's first patch query)."""

    def __call__(
        self, hidden: Float[Array, "batch length dim"], boundaries: Boundaries, capacity: int
    ) -> Float[Array, "batch tokens dim"]:
        most = groups_of(boundaries, capacity).largest(hidden)
        return jnp.where(jnp.isfinite(most), most, jnp.zeros((), hidden.dtype))

    def open(
        self, hidden: Float[Array, "batch length dim"], boundaries: Boundaries, mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch 1 dim"]:
        inside = open_rows(boundaries, mask)[..., None]
        return jnp.max(jnp.where(inside, hidden, jnp.asarray(-jnp.inf, hidden.dtype)), axis=1, keepdims=True)

    def close(
        self, hidden: Float[Array, "batch 1 dim"], memory: Float[Array, "batch 1 dim"]
    ) -> Float[Array, "batch 1 dim"]:
        return jnp.maximum(hidden, memory)

    def advance(
        self, hidden: Float[Array, "batch 1 dim"], boundaries: Boundaries, memory: Float[Array, "batch 1 dim"]
    ) -> Float[Array, "batch 1 dim"]:
        empty = jnp.full_like(memory, -jnp.inf)
        return jnp.where(boundaries.actions[..., None], empty, jnp.maximum(hidden, memory))


class Sum(eqx.Module):
    """The rows of an open group added up, in float32, and their number."""

    total: Float[Array, "batch 1 dim"]
    count: Int[Array, "batch 1"]


class Average(AbstractPool):
    """The mean of each channel in the group, in float32 (H-Net fig. 13)."""

    def __call__(
        self, hidden: Float[Array, "batch length dim"], boundaries: Boundaries, capacity: int
    ) -> Float[Array, "batch tokens dim"]:
        groups = groups_of(boundaries, capacity)
        count = groups.total(jnp.ones((*hidden.shape[:2], 1)))
        return (groups.total(hidden.astype(jnp.float32)) / jnp.maximum(count, 1.0)).astype(hidden.dtype)

    def open(
        self, hidden: Float[Array, "batch length dim"], boundaries: Boundaries, mask: Bool[Array, "batch length"]
    ) -> Sum:
        inside = open_rows(boundaries, mask)
        total = jnp.sum(jnp.where(inside[..., None], hidden.astype(jnp.float32), 0.0), axis=1, keepdims=True)
        return Sum(total, jnp.sum(inside, axis=1, keepdims=True, dtype=jnp.int32))

    def close(self, hidden: Float[Array, "batch 1 dim"], memory: Sum) -> Float[Array, "batch 1 dim"]:
        count = (memory.count + 1)[..., None].astype(jnp.float32)
        return ((memory.total + hidden.astype(jnp.float32)) / count).astype(hidden.dtype)

    def advance(self, hidden: Float[Array, "batch 1 dim"], boundaries: Boundaries, memory: Sum) -> Sum:
        total = jnp.where(boundaries.actions[..., None], 0.0, memory.total + hidden.astype(jnp.float32))
        return Sum(total, jnp.where(boundaries.actions, 0, memory.count + 1))


class GroupChange(eqx.Module):
    """One more row of a group, and whether it `closed` it; what the largest values are afterwards."""

    row: NewRow
    largest: Float[Array, "batch 1 dim"]
    closed: Bool[Array, " batch"]


class GroupMemory(AbstractMemory):
    """Keys and values of the rows of an open group, and their largest values."""

    rows: RowCache
    largest: Float[Array, "batch 1 dim"]

    def written(self, change: GroupChange, advance: Bool[Array, " batch"]) -> GroupMemory:
        rows = self.rows.written(change.row, advance)
        count = jnp.where(advance & change.closed, 0, rows.count)
        largest = written(self.largest, change.largest, advance)
        return GroupMemory(dataclasses.replace(rows, count=count), largest)


class CrossAttention(AbstractPool):
    r"""Queries made of the group's largest values attend to the rows of their group alone (BLT's local encoder).

    $p_{m,s} = \mathrm{CrossLayer}(q_{m,s}, \{X_l\}_{l \in g_m})$ with $q_{m,1} \dots q_{m,k} = P \max_{l \in g_m} X_l$; the
    k vectors of a token stand one after another. Softmax in float32.
    """

    unfold: Linear
    cross: CrossLayer

    def __init__(self, dim: int, heads: int, *, vectors: int = 1, key: PRNGKeyArray):
        """Tokens are `vectors` (k) times as wide as `dim`. Raises `ValueError` where `heads` does not divide `dim`, and for no
        vectors."""
        if vectors < 1:
            raise ValueError(f"a token has at least one vector; got {vectors}")
        key_unfold, key_cross = jax.random.split(key)
        self.unfold, self.cross = Linear(dim, vectors * dim, key=key_unfold), CrossLayer(dim, heads, key=key_cross)

    def __call__(
        self, hidden: Float[Array, "batch length dim"], boundaries: Boundaries, capacity: int
    ) -> Float[Array, "batch tokens token_dim"]:
        groups, heads = groups_of(boundaries, capacity), self.cross.heads
        first = self._vectors(Largest()(hidden, boundaries, capacity))
        asked = groups.spread(self.cross.asked(first).reshape(*first.shape[:2], -1))
        asked = asked.reshape(*hidden.shape[:2], -1, heads, hidden.shape[2] // heads)
        keys, values = (rows[:, :, None] for rows in self._keys_values(hidden))
        logits = jnp.sum(asked.astype(jnp.float32) * keys.astype(jnp.float32), axis=-1) * keys.shape[-1] ** -0.5
        most = jax.lax.stop_gradient(groups.largest(logits))
        most = jnp.where(jnp.isfinite(most), most, 0.0)
        most = groups.spread(most.reshape(*most.shape[:2], -1)).reshape(logits.shape)
        # Logits of rows of no group have no bound, and an overflow there would be a gradient that is not a number.
        inside = groups.inside[..., None, None]
        weights = jnp.where(inside, jnp.exp(jnp.where(inside, logits - most, 0.0)), 0.0)
        total = groups.total(weights[..., None] * values.astype(jnp.float32))
        scale = groups.total(weights)
        mixed = (total / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(hidden.dtype)
        return self.cross.joined(first, mixed).reshape(*first.shape[:2], -1)

    def open(
        self, hidden: Float[Array, "batch length dim"], boundaries: Boundaries, mask: Bool[Array, "batch length"]
    ) -> GroupMemory:
        inside = open_rows(boundaries, mask)
        count, length = jnp.sum(inside, axis=1, dtype=jnp.int32), mask.shape[1]
        # The rows of the open group come first.
        place = jnp.sum(mask, axis=1, dtype=jnp.int32)[:, None] - count[:, None] + jnp.arange(length, dtype=jnp.int32)
        found = jnp.take_along_axis(hidden, jnp.minimum(place, length - 1)[..., None], axis=1)
        keys, values = (jnp.swapaxes(rows, 1, 2) for rows in self._keys_values(found))
        return GroupMemory(RowCache(keys, values, count, False), Largest().open(hidden, boundaries, mask))

    def close(self, hidden: Float[Array, "batch 1 dim"], memory: GroupMemory) -> Float[Array, "batch 1 token_dim"]:
        first, row = self._vectors(Largest().close(hidden, memory.largest)), self._row(hidden)
        asked = self.cross.asked(first)[:, 0]
        vectors = range(asked.shape[1])
        mixed = jnp.stack([attend_cached(asked[:, one], row, memory.rows, cap=None) for one in vectors], axis=1)
        return self.cross.joined(first, mixed[:, None]).reshape(*hidden.shape[:2], -1)

    def advance(self, hidden: Float[Array, "batch 1 dim"], boundaries: Boundaries, memory: GroupMemory) -> GroupChange:
        largest = Largest().advance(hidden, boundaries, memory.largest)
        return GroupChange(self._row(hidden), largest, boundaries.actions[:, 0])

    def _vectors(self, most: Float[Array, "batch tokens dim"]) -> Float[Array, "batch tokens vectors dim"]:
        return self.unfold(most).reshape(*most.shape[:2], -1, most.shape[2])

    def _row(self, hidden: Float[Array, "batch 1 dim"]) -> NewRow:
        key, value = self._keys_values(hidden)
        return NewRow(key[:, 0], value[:, 0])

    def _keys_values(self, hidden: Float[Array, "batch length dim"]) -> tuple[Array, Array]:
        """Keys and values, each `batch length heads head_dim`."""
        keys, values = jnp.split(self.cross.keys_values(hidden), 2, axis=-1)
        return self.cross.by_heads(keys), self.cross.by_heads(values)


class WithBoundary(AbstractPool):
    """What another pool makes of a group plus the group's last row, the one at its boundary (H-Net fig. 13, +Res)."""

    pool: AbstractPool
    implementation: Implementation | None = eqx.field(static=True, default=None)

    def __call__(
        self, hidden: Float[Array, "batch length dim"], boundaries: Boundaries, capacity: int
    ) -> Float[Array, "batch tokens dim"]:
        last = downsample(hidden, boundaries.actions, capacity, implementation=self.implementation).values
        return self.pool(hidden, boundaries, capacity) + last

    def open(
        self, hidden: Float[Array, "batch length dim"], boundaries: Boundaries, mask: Bool[Array, "batch length"]
    ) -> PyTree[Array]:
        return self.pool.open(hidden, boundaries, mask)

    def close(self, hidden: Float[Array, "batch 1 dim"], memory: PyTree[Array]) -> Float[Array, "batch 1 dim"]:
        return self.pool.close(hidden, memory) + hidden

    def advance(
        self, hidden: Float[Array, "batch 1 dim"], boundaries: Boundaries, memory: PyTree[Array]
    ) -> PyTree[Array]:
        return self.pool.advance(hidden, boundaries, memory)


class PooledMemory(eqx.Module):
    """What the pool keeps of the open group, and what the chunker that brings tokens back keeps."""

    group: PyTree[Array]
    back: PyTree[Array]


class Pooled(AbstractChunker):
    """Tokens made by a `pool` of the rows that their boundaries close; another chunker brings them `back`."""

    pool: AbstractPool
    back: AbstractChunker
    implementation: Implementation | None = eqx.field(static=True, default=None)

    def down(self, hidden: Float[Array, "batch length dim"], boundaries: Boundaries, *, capacity: int) -> TokenRows:
        rows = downsample(hidden, boundaries.actions, capacity, implementation=self.implementation)
        values = jnp.where(rows.mask[..., None], self.pool(hidden, boundaries, capacity), jnp.zeros((), hidden.dtype))
        return dataclasses.replace(rows, values=values)

    def up(
        self,
        outputs: Float[Array, "batch tokens token_dim"],
        rows: TokenRows,
        hidden: Float[Array, "batch length dim"],
        boundaries: Boundaries,
    ) -> Float[Array, "batch length dim"]:
        return self.back.up(outputs, rows, hidden, boundaries)

    def remember(
        self,
        outputs: Float[Array, "batch tokens token_dim"],
        rows: TokenRows,
        hidden: Float[Array, "batch length dim"],
        boundaries: Boundaries,
        mask: Bool[Array, "batch length"],
    ) -> PooledMemory:
        back = self.back.remember(outputs, rows, hidden, boundaries, mask)
        return PooledMemory(self.pool.open(hidden, boundaries, mask), back)

    def down_step(
        self, hidden: Float[Array, "batch 1 dim"], boundaries: Boundaries, memory: PooledMemory
    ) -> Float[Array, "batch 1 token_dim"]:
        return self.pool.close(hidden, memory.group)

    def up_step(
        self,
        output: Float[Array, "batch 1 token_dim"],
        value: Float[Array, "batch 1 token_dim"],
        hidden: Float[Array, "batch 1 dim"],
        boundaries: Boundaries,
        memory: PooledMemory,
    ) -> Joined:
        joined = self.back.up_step(output, value, hidden, boundaries, memory.back)
        return Joined(joined.hidden, PooledMemory(self.pool.advance(hidden, boundaries, memory.group), joined.memory))
