"""Layouts of text, and how likely its bytes are."""

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
    """The layout of byte rows: one document a row unless `segments` number several, nothing padded unless `mask` says so."""
    positions = jnp.broadcast_to(jnp.arange(bytes.shape[1], dtype=jnp.int32), bytes.shape)
    segments = jnp.zeros(bytes.shape, jnp.int32) if segments is None else segments.astype(jnp.int32)
    mask = jnp.ones(bytes.shape, bool) if mask is None else mask
    return Layout(bytes.astype(jnp.int32), positions, segments, mask)


def next_byte_log_lik(
    logits: Float[Array, "batch length vocab"], bytes: Integer[Array, "batch length"]
) -> Float[Array, "batch length"]:
    r"""$\log p(x_{i+1} \mid x_{\le i})$ in nats and float32; 0 at the last row, which predicts nothing that is there."""
    log_lik = log_lik_of(logits, jnp.roll(bytes.astype(jnp.int32), -1, axis=1))
    return jnp.where(jnp.arange(bytes.shape[1]) < bytes.shape[1] - 1, log_lik, 0.0)


def log_lik_of(
    logits: Float[Array, "batch rows vocab"], targets: Int[Array, "batch rows"]
) -> Float[Array, "batch rows"]:
    """The log-likelihood of each target in nats, in float32."""
    logits = logits.astype(jnp.float32)
    # A comparison instead of a gather: it fuses, forward and backward.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)


def continues(layout: Layout) -> Bool[Array, "batch length"]:
    """True where the next row holds a byte of the same document, which is where a prediction can be scored."""
    same = layout.segments[:, 1:] == layout.segments[:, :-1]
    return jnp.pad(same & layout.mask[:, 1:] & layout.mask[:, :-1], ((0, 0), (0, 1)))
