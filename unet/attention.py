"""Causal attention, full or block-local, with the logits capped and the softmax in float32."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from estimators.base import Layout
from unet.layers import Linear, Rotary


class Visibility(eqx.Module):
    """Which keys each query sees, in the block form that `attend` works in.

    The rows are cut into `blocks` of `block` queries; each block sees `span` keys: itself and, where attention is
    windowed, the block before it.
    """

    mask: Bool[Array, "batch blocks block span"]
    window: int | None = eqx.field(static=True)

    def __init__(self, layout: Layout, window: int | None):
        """Causal, within a document, never from or to padding but for a padded row and itself (a softmax needs one key).

        `window`: how many rows a query sees, itself included; None for all before it.
        """
        length = layout.mask.shape[1]
        # A window over everything is none, and needs no block before its only one.
        window = None if window is not None and window >= length else window
        self.window = window
        block = length if window is None else window
        segments = jnp.where(layout.mask, layout.segments, -1)
        place = jnp.broadcast_to(jnp.arange(length), segments.shape)
        queries, keys = _blocks(segments, block, fill=-1), _spans(segments, block, window, fill=-2)
        # Rows added to fill the last block lie beyond every query, so no query sees them.
        here, there = _blocks(place, block, fill=length), _spans(place, block, window, fill=length)
        distance = here[..., :, None] - there[..., None, :]
        allowed = (queries[..., :, None] == keys[..., None, :]) & (distance >= 0) & (queries[..., :, None] >= 0)
        if window is not None:
            allowed = allowed & (distance < window)
        self.mask = allowed | (distance == 0)


def attend(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads head_dim"],
    visibility: Visibility,
    *,
    cap: float,
) -> Float[Array, "batch length heads head_dim"]:
    r"""$\mathrm{softmax}\big(c\tanh(qk^\top/(c\sqrt{d}))\big)v$ over the visible keys (Gemma 2).

    Time and memory are `length · window` where attention is windowed, `length²` where it is full. Logits and softmax are
    float32, the result has the dtype of `value`.
    """
    batch, length, heads, head_dim = query.shape
    block = visibility.mask.shape[2]
    query = _blocks(query * jnp.asarray(head_dim**-0.5, query.dtype), block, fill=0)
    key, value = (_spans(rows, block, visibility.window, fill=0) for rows in (key, value))
    logits = jnp.einsum("bnqhd,bnkhd->bnhqk", query, key, preferred_element_type=jnp.float32)
    logits = cap * jnp.tanh(logits / cap)
    logits = jnp.where(visibility.mask[:, :, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bnhqk,bnkhd->bnqhd", weights, value)
    return mixed.reshape(batch, -1, heads, head_dim)[:, :length]


class Attention(eqx.Module):
    """Multi-head self-attention with rotary positions and no biases (Gemma 2)."""

    qkv: Linear
    out: Linear
    heads: int = eqx.field(static=True)
    cap: float = eqx.field(static=True)

    def __init__(self, dim: int, heads: int, *, cap: float = 50.0, key: PRNGKeyArray):
        """Query, key and value share one matrix, in this order. Raises `ValueError` where `heads` does not divide `dim`."""
        if dim % heads:
            raise ValueError(f"{heads} heads do not divide a width of {dim}")
        key_in, key_out = jax.random.split(key)
        self.qkv = Linear(dim, 3 * dim, key=key_in)
        self.out = Linear(dim, dim, key=key_out)
        self.heads = heads
        self.cap = cap

    def __call__(
        self, x: Float[Array, "batch length dim"], rotary: Rotary, visibility: Visibility
    ) -> Float[Array, "batch length dim"]:
        batch, length, dim = x.shape
        query, key, value = (part.reshape(batch, length, self.heads, -1) for part in jnp.split(self.qkv(x), 3, axis=-1))
        mixed = attend(rotary(query), rotary(key), value, visibility, cap=self.cap)
        return self.out(mixed.reshape(batch, length, dim))


def _blocks(rows: Array, block: int, *, fill: int) -> Array:
    """`batch length …` to `batch blocks block …`, the last block filled up."""
    padding = -rows.shape[1] % block
    rows = jnp.pad(rows, [(0, 0), (0, padding)] + [(0, 0)] * (rows.ndim - 2), constant_values=fill)
    return rows.reshape(rows.shape[0], -1, block, *rows.shape[2:])


def _spans(rows: Array, block: int, window: int | None, *, fill: int) -> Array:
    """`batch length …` to the keys of each block, `batch blocks span …`: the block before it where windowed, and itself."""
    own = _blocks(rows, block, fill=fill)
    if window is None:
        return own
    before = jnp.pad(own[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (own.ndim - 2), constant_values=fill)
    return jnp.concatenate([before, own], axis=2)
