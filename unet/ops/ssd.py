"""The state-space recurrence of Mamba-2, in linear time: products of matrices within chunks, a scan from chunk to chunk."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CHUNK = 128
"""Rows of a chunk: its products grow with its length, the states that are carried from chunk to chunk shrink with it."""


class SSDOutput(eqx.Module):
    """What each row reads from the state, and the state after the last row; both float32."""

    values: Float[Array, "batch length heads head_dim"]
    state: Float[Array, "batch heads head_dim state"]


def ssd(
    values: Float[Array, "batch length heads head_dim"],
    log_decay: Float[Array, "batch length heads"],
    writes: Float[Array, "batch length state"],
    reads: Float[Array, "batch length state"],
    starts: Bool[Array, "batch length"],
    *,
    chunk: int = CHUNK,
) -> SSDOutput:
    r"""$h_t = e^{l_t} h_{t-1} + v_t b_t^\top$, $y_t = h_t c_t$ for each head, from $h_{-1} = 0$ (Mamba-2, section 6).

    `values` v, `log_decay` l (not positive), `writes` b, `reads` c; b and c are common to all heads. Where `starts` is True the
    state is zero before the row. Everything is computed in float32. In closed form, within a chunk,
    $y_t = \sum_{s \le t} e^{L_t - L_s} (c_t \cdot b_s) v_s$ with $L_t = \sum_{u \le t} l_u$; what came before the chunk is one
    state. Time and memory are linear in the length. Raises `ValueError` for a chunk of no rows.
    """
    if chunk < 1:
        raise ValueError(f"a chunk has at least one row; got {chunk}")
    length = values.shape[1]
    chunk = min(chunk, length)

    def cut(rows: Array) -> Array:
        """`batch length …` to `batch chunks chunk …`; the rows that fill the last chunk leave the state as it is."""
        rows = jnp.pad(rows, [(0, 0), (0, -length % chunk), *[(0, 0)] * (rows.ndim - 2)])
        return rows.reshape(rows.shape[0], -1, chunk, *rows.shape[2:])

    writes, reads, wide = (cut(rows.astype(jnp.float32)) for rows in (writes, reads, values))
    wide = jnp.swapaxes(wide, 2, 3)
    total = jnp.cumsum(jnp.swapaxes(cut(log_decay.astype(jnp.float32)), 2, 3), axis=-1)
    # The number of documents that began in the chunk so far: rows see those with the same, and row 0 what was carried in.
    document = jnp.cumsum(cut(starts), axis=2, dtype=jnp.int32)

    inside = _inside(wide, total, writes, reads, document)
    last = document[..., -1:]
    kept = jnp.where((document == last)[:, :, None], total[..., -1:] - total, -jnp.inf)
    added = jnp.einsum("bzhqp,bzqn->bzhpn", wide * jnp.exp(kept)[..., None], writes)
    carried = jnp.where(last == 0, total[..., -1], -jnp.inf)

    def step(state: Array, one: tuple[Array, Array]) -> tuple[Array, Array]:
        carried, added = one
        return jnp.exp(carried)[..., None, None] * state + added, state

    along = jnp.moveaxis(carried, 1, 0), jnp.moveaxis(added, 1, 0)
    state, before = jax.lax.scan(step, jnp.zeros_like(added[:, 0]), along)
    faded = jnp.exp(jnp.where((document == 0)[:, :, None], total, -jnp.inf))
    brought = jnp.einsum("zbhpn,bzqn->bzhqp", before, reads) * faded[..., None]
    out = jnp.swapaxes(inside + brought, 2, 3)
    return SSDOutput(out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length], state)


def _inside(
    values: Float[Array, "batch chunks heads chunk head_dim"],
    total: Float[Array, "batch chunks heads chunk"],
    writes: Float[Array, "batch chunks chunk state"],
    reads: Float[Array, "batch chunks chunk state"],
    document: Int[Array, "batch chunks chunk"],
) -> Float[Array, "batch chunks heads chunk head_dim"]:
    """What rows read of rows of their own chunk."""
    rows = jnp.arange(values.shape[3])
    seen = (rows[:, None] >= rows) & (document[..., :, None] == document[..., None, :])
    # Masked before the exponential, which would overflow for rows to come.
    decay = jnp.exp(jnp.where(seen[:, :, None], total[..., :, None] - total[..., None, :], -jnp.inf))
    weights = decay * jnp.einsum("bzqn,bzsn->bzqs", reads, writes)[:, :, None]
    return weights @ values


def ssd_step(
    value: Float[Array, "batch heads head_dim"],
    log_decay: Float[Array, "batch heads"],
    write: Float[Array, "batch state"],
    read: Float[Array, "batch state"],
    state: Float[Array, "batch heads head_dim state"],
) -> SSDOutput:
    """One row of `ssd`, from the state before it."""
    wide = value.astype(jnp.float32)[..., None] * write.astype(jnp.float32)[:, None, None, :]
    state = jnp.exp(log_decay.astype(jnp.float32))[..., None, None] * state + wide
    return SSDOutput(jnp.einsum("bhpn,bn->bhp", state, read.astype(jnp.float32))[:, None], state)


def ssd_sequential(
    values: Float[Array, "batch length heads head_dim"],
    log_decay: Float[Array, "batch length heads"],
    writes: Float[Array, "batch length state"],
    reads: Float[Array, "batch length state"],
    starts: Bool[Array, "batch length"],
) -> SSDOutput:
    """`ssd` one row after another: the recurrence as it is written, to measure and check it against."""

    def step(state: Array, row: tuple[Array, ...]) -> tuple[Array, Array]:
        value, decay, write, read, start = row
        done = ssd_step(value, decay, write, read, jnp.where(start[:, None, None, None], 0.0, state))
        return done.state, done.values[:, 0]

    batch, _, heads, head_dim = values.shape
    rows = tuple(jnp.swapaxes(part, 0, 1) for part in (values, log_decay, writes, reads, starts))
    state, read = jax.lax.scan(step, jnp.zeros((batch, heads, head_dim, writes.shape[-1])), rows)
    return SSDOutput(jnp.swapaxes(read, 0, 1), state)
