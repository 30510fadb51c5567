"""Layouts of texts, and log-probabilities of their bytes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from estimators.base import Layout


def plain_layout(
    bytes: Integer[Array, "batch length"],
    segments: Int[Array, "batch length"] | None = None,
    mask: Bool[Array, "batch length"] | None = None,
) -> Layout:
    """The layout of sequences of bytes: one document each unless `segments` numbers several, no padding unless `mask` marks
    some."""
    positions = jnp.broadcast_to(jnp.arange(bytes.shape[1], dtype=jnp.int32), bytes.shape)
    segments = jnp.zeros(bytes.shape, jnp.int32) if segments is None else segments.astype(jnp.int32)
    mask = jnp.ones(bytes.shape, bool) if mask is None else mask
    return Layout(bytes.astype(jnp.int32), positions, segments, mask)


def next_logprobs(
    logits: Float[Array, "batch length vocab"], bytes: Integer[Array, "batch length"]
) -> Float[Array, "batch length"]:
    r"""$\log p(x_{i+1} \mid x_{\le i})$ in nats, float32; 0 at the last position, which has no next byte."""
    log_prob = log_prob_of(logits, jnp.roll(bytes.astype(jnp.int32), -1, axis=1))
    return jnp.where(jnp.arange(bytes.shape[1]) < bytes.shape[1] - 1, log_prob, 0.0)


def log_prob_of(
    logits: Float[Array, "batch positions vocab"], targets: Int[Array, "batch positions"]
) -> Float[Array, "batch positions"]:
    """The log-probability of each target in nats, float32."""
    logits = logits.astype(jnp.float32)
    # A comparison instead of a gather, since it fuses in both passes.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)


def continues(layout: Layout) -> Bool[Array, "batch length"]:
    """True where the next position holds a byte of the same document, so that the prediction can be scored."""
    same = layout.segments[:, 1:] == layout.segments[:, :-1]
    return jnp.pad(same & layout.mask[:, 1:] & layout.mask[:, :-1], ((0, 0), (0, 1)))
