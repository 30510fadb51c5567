"""The state-space recurrence of Mamba-2 in linear time: matrix products within chunks, a scan from chunk to chunk."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from estimators.sharding import varying_zeros

CHUNK = 128
"""Positions per chunk. With longer chunks the products within them grow, and fewer states are carried from chunk to chunk."""


class SSDOutput(eqx.Module):
    """The outputs y, and the state h after the last position; both float32."""

    y: Float[Array, "batch length heads head_dim"]
    h: Float[Array, "batch heads head_dim state"]


def ssd(
    x: Float[Array, "batch length heads head_dim"],
    log_decay: Float[Array, "batch length heads"],
    B: Float[Array, "batch length state"],
    C: Float[Array, "batch length state"],
    starts: Bool[Array, "batch length"],
    initial: Float[Array, "batch heads head_dim state"] | None = None,
    *,
    chunk: int = CHUNK,
) -> SSDOutput:
    r"""$h_t = e^{l_t} h_{t-1} + x_t B_t^\top$, $y_t = h_t C_t$ for each head, from $h_{-1}$ (Mamba-2, section 6).

    `initial` is $h_{-1}$ (None: zero). `log_decay` l is not positive; B and C are shared by all heads. Where `starts` is True
    the state is reset to zero before the position. Everything is float32. In closed form, within a chunk,
    $y_t = \sum_{s \le t} e^{L_t - L_s} (C_t \cdot B_s) x_s$ with $L_t = \sum_{u \le t} l_u$; earlier chunks contribute through
    one state. Time and memory are linear in the length. Raises `ValueError` for a chunk of no positions.
    """
    if chunk < 1:
        raise ValueError(f"a chunk must have at least one position; got {chunk}")
    length, initial = x.shape[1], _or_zero(initial, x, B)
    if length == 1:
        before = jnp.where(starts[..., None, None], 0.0, initial)
        return ssd_step(x[:, 0], log_decay[:, 0], B[:, 0], C[:, 0], before)
    chunk = min(chunk, length)

    def cut(values: Array) -> Array:
        """`batch length …` to `batch chunks chunk …`; the padding of the last chunk leaves the state unchanged."""
        values = jnp.pad(values, [(0, 0), (0, -length % chunk), *[(0, 0)] * (values.ndim - 2)])
        return values.reshape(values.shape[0], -1, chunk, *values.shape[2:])

    B, C, x = (cut(values.astype(jnp.float32)) for values in (B, C, x))
    x = jnp.swapaxes(x, 2, 3)
    L = jnp.cumsum(jnp.swapaxes(cut(log_decay.astype(jnp.float32)), 2, 3), axis=-1)
    # Documents started in the chunk so far: positions see those with the same number, and number 0 also the state before.
    document = jnp.cumsum(cut(starts), axis=2, dtype=jnp.int32)

    # 1. Outputs within each chunk, (b, z, h, q, p): the diagonal blocks.
    diagonal = _diagonal(x, L, B, C, document)

    # 2. The state that each chunk adds, (b, z, h, p, n), and the log-decay of the state before it, (b, z, h).
    last = document[..., -1:]
    decay_to_end = jnp.where((document == last)[:, :, None], L[..., -1:] - L, -jnp.inf)
    states = jnp.einsum("bzhqp,bzqn->bzhpn", x * jnp.exp(decay_to_end)[..., None], B)
    log_remains = jnp.where(last == 0, L[..., -1], -jnp.inf)

    # 3. The recurrence from chunk to chunk: the state before each, (z, b, h, p, n).
    def step(h: Array, one: tuple[Array, Array]) -> tuple[Array, Array]:
        log_remains, added = one
        return jnp.exp(log_remains)[..., None, None] * h + added, h

    chunks = jnp.moveaxis(log_remains, 1, 0), jnp.moveaxis(states, 1, 0)
    h, before = jax.lax.scan(step, initial, chunks)

    # 4. The contribution of the state before each chunk: the off-diagonal blocks.
    decay_from_start = jnp.exp(jnp.where((document == 0)[:, :, None], L, -jnp.inf))
    off_diagonal = jnp.einsum("zbhpn,bzqn->bzhqp", before, C) * decay_from_start[..., None]
    y = jnp.swapaxes(diagonal + off_diagonal, 2, 3)
    return SSDOutput(y.reshape(y.shape[0], -1, *y.shape[3:])[:, :length], h)


def _diagonal(
    x: Float[Array, "batch chunks heads chunk head_dim"],
    L: Float[Array, "batch chunks heads chunk"],
    B: Float[Array, "batch chunks chunk state"],
    C: Float[Array, "batch chunks chunk state"],
    document: Int[Array, "batch chunks chunk"],
) -> Float[Array, "batch chunks heads chunk head_dim"]:
    """The contribution of positions of the same chunk."""
    place = jnp.arange(x.shape[3])
    seen = (place[:, None] >= place) & (document[..., :, None] == document[..., None, :])
    # Masked before the exponential, which would overflow for later positions.
    decay = jnp.exp(jnp.where(seen[:, :, None], L[..., :, None] - L[..., None, :], -jnp.inf))
    weights = decay * jnp.einsum("bzqn,bzsn->bzqs", C, B)[:, :, None]
    return weights @ x


def ssd_step(
    x: Float[Array, "batch heads head_dim"],
    log_decay: Float[Array, "batch heads"],
    B: Float[Array, "batch state"],
    C: Float[Array, "batch state"],
    h: Float[Array, "batch heads head_dim state"],
) -> SSDOutput:
    """One position of `ssd`, from the state h before it."""
    added = x.astype(jnp.float32)[..., None] * B.astype(jnp.float32)[:, None, None, :]
    h = jnp.exp(log_decay.astype(jnp.float32))[..., None, None] * h + added
    return SSDOutput(jnp.einsum("bhpn,bn->bhp", h, C.astype(jnp.float32))[:, None], h)


def ssd_sequential(
    x: Float[Array, "batch length heads head_dim"],
    log_decay: Float[Array, "batch length heads"],
    B: Float[Array, "batch length state"],
    C: Float[Array, "batch length state"],
    starts: Bool[Array, "batch length"],
    initial: Float[Array, "batch heads head_dim state"] | None = None,
) -> SSDOutput:
    """`ssd` one position at a time: the reference for tests and benchmarks."""

    def step(h: Array, position: tuple[Array, ...]) -> tuple[Array, Array]:
        x, log_decay, B, C, start = position
        output = ssd_step(x, log_decay, B, C, jnp.where(start[:, None, None, None], 0.0, h))
        return output.h, output.y[:, 0]

    positions = tuple(jnp.swapaxes(part, 0, 1) for part in (x, log_decay, B, C, starts))
    h, y = jax.lax.scan(step, _or_zero(initial, x, B), positions)
    return SSDOutput(jnp.swapaxes(y, 0, 1), h)


def _or_zero(
    initial: Float[Array, "batch heads head_dim state"] | None,
    x: Float[Array, "batch length heads head_dim"],
    B: Float[Array, "batch length state"],
) -> Float[Array, "batch heads head_dim state"]:
    if initial is not None:
        return initial.astype(jnp.float32)
    return varying_zeros(x, (x.shape[0], *x.shape[2:], B.shape[-1]), jnp.float32)
