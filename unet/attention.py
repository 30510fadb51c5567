"""Causal attention, full or block-local, with the logits capped and the softmax in float32."""

from __future__ import annotations

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from estimators.base import Layout
from unet.cache import Cached, ChosenRows, NewRow, RowCache, attend_cached, capped, filled_cache
from unet.cross import Tokens
from unet.folding import Squares
from unet.layers import Linear, Rotary

QUERIES = 2048
"""Rows that full attention over a longer text takes at a time, so that its memory grows with the length and not its square."""

STRIP = 128
"""Fewest rows of a strip of full attention over a shorter text, which leaves out the keys after it; there are four strips at
most."""


class Visibility(eqx.Module):
    """Which keys each query sees, in the block form that `attend` works in.

    The rows are cut into blocks of queries. Where attention is windowed, a block is as long as the window and sees itself and
    the block before it; where it is full, a block sees all rows, and there is one block up to a length of `QUERIES`.
    """

    segments: Int[Array, "batch length"]
    mask: Bool[Array, "batch blocks block span"] | None
    window: int | None = eqx.field(static=True)

    def __init__(self, layout: Layout, window: int | None):
        """Causal, within a document, never from or to padding but for a padded row and itself (a softmax needs one key).

        `window`: how many rows a query sees, itself included; None for all before it.
        """
        length = layout.mask.shape[1]
        self.segments = jnp.where(layout.mask, layout.segments, -1)
        # A window over everything is none, and needs no block before its only one.
        self.window = None if window is not None and window >= length else window
        block = length if self.window is None else self.window
        # Full attention over a long text makes the mask of each block when it comes to it.
        self.mask = self._blockwise(block) if self.window is not None or length <= QUERIES else None

    def _blockwise(self, block: int) -> Bool[Array, "batch blocks block span"]:
        length = self.segments.shape[1]
        place = jnp.broadcast_to(jnp.arange(length), self.segments.shape)
        queries, keys = _blocks(self.segments, block, fill=-1), _spans(self.segments, block, self.window, fill=-2)
        # Rows added to fill the last block lie beyond every query, so no query sees them.
        here, there = _blocks(place, block, fill=length), _spans(place, block, self.window, fill=length)
        return visible(queries, here, keys, there, self.window)


def visible(
    queries: Int[Array, "*rows block"],
    here: Int[Array, "*rows block"],
    keys: Int[Array, "*rows span"],
    there: Int[Array, "*rows span"],
    window: int | None,
) -> Bool[Array, "*rows block span"]:
    """Whether each query sees each key, from their documents (`queries`, `keys`; negative for padding) and places (`here`,
    `there`)."""
    distance = here[..., :, None] - there[..., None, :]
    allowed = (queries[..., :, None] == keys[..., None, :]) & (distance >= 0) & (queries[..., :, None] >= 0)
    if window is not None:
        allowed = allowed & (distance < window)
    return allowed | (distance == 0)


def attend(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads head_dim"],
    visibility: Visibility,
    *,
    cap: float | None,
) -> Float[Array, "batch length heads head_dim"]:
    r"""$\mathrm{softmax}\big(c\tanh(qk^\top/(c\sqrt{d}))\big)v$ over the visible keys (Gemma 2). Without a cap the logits
    are $qk^\top/\sqrt{d}$.

    Where attention is windowed, time and memory are `length · window`. Where it is full, time is `length²`, and memory
    `length · QUERIES`: over longer texts the weights of a block of queries are computed again in the backward pass. Logits
    and softmax are float32, the result has the dtype of `value`.
    """
    length, head_dim = query.shape[1], query.shape[3]
    # Heads first: products of whole matrices, which a CPU does at twice the speed.
    query, key, value = (jnp.swapaxes(rows, 1, 2) for rows in (query, key, value))
    query = query * jnp.asarray(head_dim**-0.5, query.dtype)
    if visibility.mask is None:
        mixed = _attend_in_turns(query, key, value, visibility.segments, cap)
    elif visibility.window is None:
        mixed = _attend_in_strips(query, key, value, visibility.mask[:, 0], cap)
    else:
        block = visibility.mask.shape[2]
        key, value = (_spans(rows, block, visibility.window, fill=0, axis=2) for rows in (key, value))
        mixed = _mix(_blocks(query, block, fill=0, axis=2), key, value, visibility.mask[:, None], cap)
        mixed = mixed.reshape(*query.shape[:2], -1, head_dim)[:, :, :length]
    return jnp.swapaxes(mixed, 1, 2)


def _mix(
    query: Float[Array, "*some block head_dim"],
    key: Float[Array, "*some span head_dim"],
    value: Float[Array, "*some span head_dim"],
    mask: Bool[Array, "*#some block span"],
    cap: float | None,
) -> Float[Array, "*some block head_dim"]:
    logits = jnp.matmul(query, jnp.swapaxes(key, -1, -2), preferred_element_type=jnp.float32)
    logits = jnp.where(mask, capped(logits, cap), -jnp.inf)
    return jnp.matmul(jax.nn.softmax(logits, axis=-1).astype(value.dtype), value)


def _attend_in_strips(
    query: Float[Array, "batch heads length head_dim"],
    key: Float[Array, "batch heads length head_dim"],
    value: Float[Array, "batch heads length head_dim"],
    mask: Bool[Array, "batch length length"],
    cap: float | None,
) -> Float[Array, "batch heads length head_dim"]:
    """Full attention in a few strips of queries, each with the keys up to its end."""
    length = query.shape[2]
    strip = -(-length // max(1, min(4, length // STRIP)))
    strips = []
    for start in range(0, length, strip):
        end = min(start + strip, length)
        seen = mask[:, None, start:end, :end]
        strips.append(_mix(query[:, :, start:end], key[:, :, :end], value[:, :, :end], seen, cap))
    return jnp.concatenate(strips, axis=2)


def _attend_in_turns(
    query: Float[Array, "batch heads length head_dim"],
    key: Float[Array, "batch heads length head_dim"],
    value: Float[Array, "batch heads length head_dim"],
    segments: Int[Array, "batch length"],
    cap: float | None,
) -> Float[Array, "batch heads length head_dim"]:
    """Full attention, one block of queries after another."""
    length = query.shape[2]
    place = jnp.broadcast_to(jnp.arange(length), segments.shape)

    @jax.checkpoint
    def one(block: tuple[Array, Array, Array]) -> Array:
        query, queries, here = block
        return _mix(query, key, value, visible(queries, here, segments, place, None)[:, None], cap)

    size = -(-length // -(-length // QUERIES))
    # Rows added to fill the last block belong to no document; each of them sees the first row, since a softmax needs one key.
    queries, here = _blocks(segments, size, fill=-1), _blocks(place, size, fill=0)
    blocks = jnp.moveaxis(_blocks(query, size, fill=0, axis=2), 2, 0), *(jnp.moveaxis(a, 1, 0) for a in (queries, here))
    mixed = jax.lax.map(one, blocks)
    return jnp.moveaxis(mixed, 0, 2).reshape(*query.shape[:2], -1, query.shape[3])[:, :, :length]


class Surroundings(eqx.Module):
    """What the layers of a network need to know of its rows: their `layout`; and for attention, where there is any, how
    positions turn them, which of them see each other, and how they come apart where they are folded (which `rotary` and
    `visibility` then describe). `tokens`, where a stack looks at those of the level inside, have the vectors that each is
    unfolded into for outputs. Matrix products are done in `compute`."""

    layout: Layout
    rotary: Rotary | None
    visibility: Visibility | None
    squares: Squares | None = None
    tokens: Tokens | None = None
    window: int | None = eqx.field(static=True, default=None)
    compute: str = eqx.field(static=True, default="float32")


class AbstractMixer(eqx.Module):
    """A causal map that mixes the rows of each document: attention, or a recurrence."""

    @property
    @abstractmethod
    def rotary_dim(self) -> int | None:
        """How many dimensions of a head positions turn; None where positions play no part."""

    @abstractmethod
    def __call__(self, x: Float[Array, "batch length dim"], around: Surroundings) -> Float[Array, "batch length dim"]:
        """All rows at once."""

    @abstractmethod
    def prefill(self, x: Float[Array, "batch length dim"], around: Surroundings) -> Cached[PyTree[Array]]:
        """The same, and what `step` needs to go on after the rows where the mask is True, which come first."""

    @abstractmethod
    def step(
        self, x: Float[Array, "batch 1 dim"], around: Surroundings, memory: PyTree[Array]
    ) -> Cached[PyTree[Array]]:
        """The next row of each sequence, and how the memory changes (see `estimators.base.written`)."""


class Turned(eqx.Module):
    """Queries, keys and values of rows, the first two turned by the positions of the rows."""

    query: Float[Array, "batch length heads head_dim"]
    key: Float[Array, "batch length heads head_dim"]
    value: Float[Array, "batch length heads head_dim"]


class Attention(AbstractMixer):
    """Multi-head self-attention with rotary positions and no biases (Gemma 2; without a cap, H-Net)."""

    qkv: Linear
    out: Linear
    heads: int = eqx.field(static=True)
    cap: float | None = eqx.field(static=True)
    turned: int | None = eqx.field(static=True, default=None)

    def __init__(self, dim: int, heads: int, *, cap: float | None = 50.0, turned: int | None = None, key: PRNGKeyArray):
        """Query, key and value share one matrix, in this order. `cap`: bound of the logits (None: none). `turned`: how many
        dimensions of a head positions turn (None: all). Raises `ValueError` where `heads` does not divide `dim`, and where a
        head has not so many dimensions."""
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide a width of {dim}")
        if turned is not None and not 0 <= turned <= dim // heads:
            raise ValueError(f"{turned} dimensions cannot be turned in a head of {dim // heads}")
        key_in, key_out = jax.random.split(key)
        self.qkv = Linear(dim, 3 * dim, key=key_in)
        self.out = Linear(dim, dim, key=key_out)
        self.heads, self.cap, self.turned = heads, cap, turned

    @property
    def rotary_dim(self) -> int | None:
        return self.out.weight.shape[0] // self.heads if self.turned is None else self.turned

    def __call__(self, x: Float[Array, "batch length dim"], around: Surroundings) -> Float[Array, "batch length dim"]:
        squares = around.squares
        qkv = self.qkv(x) if squares is None else squares.apart(self.qkv(x))
        mixed = self._mixed(self._turned(qkv, around), around)
        return self.out(mixed if squares is None else squares.together(mixed))

    def prefill(self, x: Float[Array, "batch length dim"], around: Surroundings) -> Cached[RowCache]:
        """The same, and a cache of the rows of each sequence, or of the last of them that a window sees."""
        turned = self._turned(self.qkv(x), around)
        keys, values = (jnp.swapaxes(rows, 1, 2) for rows in (turned.key, turned.value))
        lengths = jnp.sum(around.layout.mask, axis=1, dtype=jnp.int32)
        return Cached(self.out(self._mixed(turned, around)), filled_cache(keys, values, lengths, around.window))

    def step(
        self, x: Float[Array, "batch 1 dim"], around: Surroundings, memory: RowCache | ChosenRows
    ) -> Cached[NewRow]:
        turned = self._turned(self.qkv(x), around)
        row = NewRow(turned.key[:, 0], turned.value[:, 0])
        mixed = attend_cached(turned.query[:, 0], row, memory, cap=self.cap)
        return Cached(self.out(mixed.reshape(x.shape)), row)

    def _turned(self, qkv: Float[Array, "batch length three_dims"], around: Surroundings) -> Turned:
        query, key, value = (part.reshape(*part.shape[:2], self.heads, -1) for part in jnp.split(qkv, 3, axis=-1))
        assert around.rotary is not None
        return Turned(around.rotary(query), around.rotary(key), value)

    def _mixed(self, rows: Turned, around: Surroundings) -> Float[Array, "batch length dim"]:
        assert around.visibility is not None
        mixed = attend(rows.query, rows.key, rows.value, around.visibility, cap=self.cap)
        return mixed.reshape(*mixed.shape[:2], -1)


def _blocks(rows: Array, block: int, *, fill: int, axis: int = 1) -> Array:
    """`… length …` to `… blocks block …`, the last block filled up."""
    widths = [(0, 0)] * rows.ndim
    widths[axis] = (0, -rows.shape[axis] % block)
    rows = jnp.pad(rows, widths, constant_values=fill)
    return rows.reshape(*rows.shape[:axis], -1, block, *rows.shape[axis + 1 :])


def _spans(rows: Array, block: int, window: int | None, *, fill: int, axis: int = 1) -> Array:
    """`… length …` to the keys of each block, `… blocks span …`: the block before it where windowed, and itself."""
    own = _blocks(rows, block, fill=fill, axis=axis)
    if window is None:
        return own
    widths = [(0, 0)] * own.ndim
    widths[axis] = (1, 0)
    before = jnp.pad(jax.lax.slice_in_dim(own, 0, -1, axis=axis), widths, constant_values=fill)
    return jnp.concatenate([before, own], axis=axis + 1)
