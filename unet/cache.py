"""What attention keeps of earlier rows while a text is written row by row."""

from __future__ import annotations

from typing import Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from estimators.base import AbstractMemory

Kept = TypeVar("Kept")


class Cached(eqx.Module, Generic[Kept]):
    """Hidden states, and what is kept for the rows after them, or how that changes (see `estimators.base.written`)."""

    hidden: Float[Array, "batch length dim"]
    memory: Kept


class NewRow(eqx.Module):
    """The key and the value of one more row."""

    key: Float[Array, "batch heads head_dim"]
    value: Float[Array, "batch heads head_dim"]


class RowCache(AbstractMemory):
    """The keys and values of earlier rows: of all, row r in slot r; or of the last `slots` (`ring`), row r in slot r modulo
    `slots`.

    Sequences advance on their own: `count` says how many rows each has had. Keys have been turned by their positions, so that
    the order of the slots means nothing.
    """

    keys: Float[Array, "batch heads slots head_dim"]
    values: Float[Array, "batch heads slots head_dim"]
    count: Int[Array, " batch"]
    ring: bool = eqx.field(static=True)

    @property
    def slots(self) -> int:
        return self.keys.shape[2]

    @property
    def seen(self) -> Bool[Array, "batch slots"]:
        """The slots that the next row looks at, beside itself: of a full ring all but the oldest, whose place it takes."""
        slot = jnp.arange(self.slots, dtype=jnp.int32)
        there = slot < self.count[:, None]
        return there & (slot != self.count[:, None] % self.slots) if self.ring else there

    def written(self, change: NewRow, advance: Bool[Array, " batch"]) -> RowCache:
        """With one more row, in a ring in place of the oldest, where a sequence advances; as it is where not."""
        sequence = jnp.arange(self.count.shape[0])
        slot = self.count % self.slots if self.ring else self.count
        # Beyond the last slot nothing is written.
        slot = jnp.where(advance, slot, self.slots)

        def put(rows: Array, row: Array) -> Array:
            return rows.at[sequence, :, slot].set(row.astype(rows.dtype), mode="drop")

        count = self.count + advance.astype(jnp.int32)
        return RowCache(put(self.keys, change.key), put(self.values, change.value), count, self.ring)

    def with_room(self, rows: int) -> RowCache:
        """With slots for `rows` rows in all; a ring needs no more than it has."""
        more = 0 if self.ring else max(0, rows - self.slots)
        if not more:
            return self
        keys, values = (jnp.pad(part, ((0, 0), (0, 0), (0, more), (0, 0))) for part in (self.keys, self.values))
        return RowCache(keys, values, self.count, self.ring)


Memory = TypeVar("Memory", bound=PyTree[Array])


def _is_cache(part: object) -> bool:
    return isinstance(part, RowCache)


def with_room(memory: Memory, rows: int) -> Memory:
    """All caches inside with room for so many more rows in every sequence; the very memory given where they have it.

    Slots come in whole quarters of a power of two, so that few programs serve all lengths. Reads how many rows there are, so
    it cannot be compiled.
    """

    def needed(cache: RowCache) -> int:
        return 0 if cache.ring else int(np.max(np.asarray(cache.count))) + rows

    def widen(part: Array | RowCache) -> Array | RowCache:
        return part.with_room(rounded_up(needed(part))) if isinstance(part, RowCache) else part

    if all(needed(cache) <= cache.slots for cache in _caches(memory)):
        return memory
    return jax.tree.map(widen, memory, is_leaf=_is_cache)


def rounded_up(size: int) -> int:
    """The least whole number of quarters of a power of two, not below 16, that is at least `size`."""
    quarter = max(4, 1 << max(0, (size - 1).bit_length() - 3))
    return max(16, -(-size // quarter) * quarter)


def cache_bytes(memory: PyTree[Array]) -> int:
    """Bytes of all keys and values inside."""
    return sum(cache.keys.nbytes + cache.values.nbytes for cache in _caches(memory))


def _caches(memory: PyTree[Array]) -> list[RowCache]:
    return [part for part in jax.tree.leaves(memory, is_leaf=_is_cache) if isinstance(part, RowCache)]


def filled_cache(
    keys: Float[Array, "batch heads length head_dim"],
    values: Float[Array, "batch heads length head_dim"],
    lengths: Int[Array, " batch"],
    window: int | None,
) -> RowCache:
    """After the first `lengths` rows of each sequence, of which the next row sees all, or a `window` with itself in it."""
    lengths = lengths.astype(jnp.int32)
    if window is None:
        return RowCache(keys, values, lengths, False)
    slot = jnp.arange(window, dtype=jnp.int32)
    # The last row before the end that lies in each slot; before the first row where there is none.
    row = slot + (lengths[:, None] - 1 - slot) // window * window

    def last(rows: Array) -> Array:
        found = jnp.take_along_axis(rows, jnp.maximum(row, 0)[:, None, :, None], axis=2, mode="clip")
        return jnp.where((row >= 0)[:, None, :, None], found, jnp.zeros((), rows.dtype))

    return RowCache(last(keys), last(values), lengths, True)


def capped(logits: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    r"""$c\tanh(l/c)$, or the logits l themselves without a cap."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def attend_cached(
    query: Float[Array, "batch heads head_dim"], row: NewRow, cache: RowCache, *, cap: float | None
) -> Float[Array, "batch heads head_dim"]:
    r"""$\mathrm{softmax}\big(c\tanh(qk^\top/(c\sqrt{d}))\big)v$ over the rows in a cache and the new `row`; see `attend`.

    Where a cache that is no ring has no slot left for the row, the result is not a number.
    """
    query = (query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype))[:, :, None]
    # The products of whole matrices that a CPU does without turning the cache.
    there = jnp.matmul(query, jnp.swapaxes(cache.keys, -1, -2), preferred_element_type=jnp.float32)[:, :, 0]
    own = jnp.sum(query[:, :, 0].astype(jnp.float32) * row.key.astype(jnp.float32), axis=-1, keepdims=True)
    logits = capped(jnp.concatenate([there, own], axis=-1), cap)
    seen = jnp.pad(cache.seen, ((0, 0), (0, 1)), constant_values=True)
    weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf), axis=-1).astype(cache.values.dtype)
    mixed = jnp.matmul(weights[:, :, None, :-1], cache.values)[:, :, 0] + weights[:, :, -1:] * row.value
    if cache.ring:
        return mixed
    return jnp.where((cache.count < cache.slots)[:, None, None], mixed, jnp.asarray(jnp.nan, mixed.dtype))
