"""Mamba-2: a layer whose memory of the rows before is one matrix a head, so that time is linear and a step is constant."""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from unet.attention import AbstractMixer, Surroundings
from unet.cache import Cached
from unet.layers import Linear, ScaleNorm
from unet.ops.ssd import ssd, ssd_step

HEAD = 64
"""Width of a head."""


class MambaMemory(eqx.Module):
    """The rows that the convolution still sees, the oldest first, and the state of the recurrence, in float32."""

    recent: Float[Array, "batch taps_before channels"]
    state: Float[Array, "batch heads head_dim state"]


class Projected(eqx.Module):
    """What a row is projected to: the gate z; the channels x, B and C before their convolution; and dt, in float32."""

    gate: Float[Array, "batch length inner"]
    channels: Float[Array, "batch length channels"]
    step: Float[Array, "batch length heads"]


class Scanned(eqx.Module):
    """What the recurrence takes: x in heads, dt, and B and C; all float32."""

    values: Float[Array, "batch length heads head_dim"]
    step: Float[Array, "batch length heads"]
    writes: Float[Array, "batch length state"]
    reads: Float[Array, "batch length state"]


class Mamba2(AbstractMixer):
    r"""A Mamba-2 mixer with one group (Dao and Gu 2024), as H-Net uses it.

    $(z, x, B, C, dt) = W_{in} u$; x, B and C pass a causal depthwise convolution with a bias, then SiLU;
    $\Delta = \mathrm{softplus}(dt + b)$, $A = -e^{a}$;
    $h_t = e^{\Delta_t A} h_{t-1} + \Delta_t x_t B_t^\top$, $y_t = h_t C_t + D x_t$ per head;
    output $W_{out} N(y \odot \mathrm{silu}(z))$ with N a `ScaleNorm`.

    The recurrence is a discretisation of $\dot h = A h + x B^\top$ over steps of $\Delta$: exact in the decay, of first order in
    the input. Everything between the two projections is float32.
    """

    project_in: Linear
    conv_weight: Float[Array, "channels taps"]
    conv_bias: Float[Array, " channels"]
    step_bias: Float[Array, " heads"]
    log_rate: Float[Array, " heads"]
    skip: Float[Array, " heads"]
    norm: ScaleNorm
    project_out: Linear

    def __init__(self, dim: int, *, state: int = 128, taps: int = 4, expand: int = 2, key: PRNGKeyArray):
        r"""`state`: columns of a head's matrix. `taps`: rows that the convolution sees, its own included. The recurrence is
        `expand` times as wide as `dim`, in heads of 64. As published, $\Delta$ starts log-uniform in [.001, .1] and -A uniform
        in [1, 16]. Raises `ValueError` where that width is not whole heads."""
        inner = expand * dim
        if inner % HEAD:
            raise ValueError(f"a Mamba-2 layer is a multiple of {HEAD} wide; {expand} x {dim} is not")
        heads, channels = inner // HEAD, inner + 2 * state
        key_in, key_conv, key_step, key_rate, key_out = jax.random.split(key, 5)
        self.project_in = Linear(dim, inner + channels + heads, key=key_in)
        bound = taps**-0.5
        key_weight, key_bias = jax.random.split(key_conv)
        self.conv_weight = jax.random.uniform(key_weight, (channels, taps), minval=-bound, maxval=bound)
        self.conv_bias = jax.random.uniform(key_bias, (channels,), minval=-bound, maxval=bound)
        step = jnp.exp(jax.random.uniform(key_step, (heads,), minval=math.log(1e-3), maxval=math.log(1e-1)))
        # softplus undone.
        self.step_bias = step + jnp.log(-jnp.expm1(-step))
        self.log_rate = jnp.log(jax.random.uniform(key_rate, (heads,), minval=1.0, maxval=16.0))
        self.skip = jnp.ones((heads,))
        self.norm = ScaleNorm(inner)
        self.project_out = Linear(inner, dim, key=key_out)

    @property
    def rotary_dim(self) -> int | None:
        return None

    def __call__(self, x: Float[Array, "batch length dim"], around: Surroundings) -> Float[Array, "batch length dim"]:
        return self.prefill(x, around).hidden

    def prefill(self, x: Float[Array, "batch length dim"], around: Surroundings) -> Cached[MambaMemory]:
        projected, layout = self._projected(x), around.layout
        taps, lengths = self.conv_weight.shape[1], jnp.sum(layout.mask, axis=1, dtype=jnp.int32)
        channels, number = projected.channels, layout.numbers[..., None]
        mixed = jnp.zeros(channels.shape, jnp.float32)
        for back in range(taps):
            shifted = jnp.pad(channels, ((0, 0), (back, 0), (0, 0)))[:, : channels.shape[1]]
            # Rows of the document before are none of its rows.
            seen = jnp.where(number >= back, shifted.astype(jnp.float32), 0.0)
            mixed = mixed + seen * self.conv_weight[:, taps - 1 - back].astype(jnp.float32)
        # Padding neither fades the state nor adds to it.
        scanned = self._scanned(mixed, jnp.where(layout.mask[..., None], projected.step, 0.0))
        done = ssd(
            scanned.step[..., None] * scanned.values,
            scanned.step * self._rate,
            scanned.writes,
            scanned.reads,
            layout.starts,
        )
        place = lengths[:, None] - (taps - 1) + jnp.arange(taps - 1, dtype=jnp.int32)
        recent = jnp.take_along_axis(channels, jnp.maximum(place, 0)[..., None], axis=1, mode="clip")
        recent = jnp.where((place >= 0)[..., None], recent, jnp.zeros((), channels.dtype))
        return Cached(self._out(done.values, scanned, projected, x), MambaMemory(recent, done.state))

    def step(self, x: Float[Array, "batch 1 dim"], around: Surroundings, memory: MambaMemory) -> Cached[MambaMemory]:
        projected = self._projected(x)
        rows = jnp.concatenate([memory.recent, projected.channels.astype(memory.recent.dtype)], axis=1)
        mixed = jnp.einsum("btc,ct->bc", rows.astype(jnp.float32), self.conv_weight.astype(jnp.float32))[:, None]
        scanned = self._scanned(mixed, projected.step)
        done = ssd_step(
            (scanned.step[..., None] * scanned.values)[:, 0],
            (scanned.step * self._rate)[:, 0],
            scanned.writes[:, 0],
            scanned.reads[:, 0],
            memory.state,
        )
        return Cached(self._out(done.values, scanned, projected, x), MambaMemory(rows[:, 1:], done.state))

    @property
    def _rate(self) -> Float[Array, " heads"]:
        """A, not positive."""
        return -jnp.exp(self.log_rate.astype(jnp.float32))

    def _projected(self, x: Float[Array, "batch length dim"]) -> Projected:
        inner, channels = self.norm.weight.shape[0], self.conv_bias.shape[0]
        gate, mixed, step = jnp.split(self.project_in(x), [inner, inner + channels], axis=-1)
        return Projected(gate, mixed, jax.nn.softplus(step.astype(jnp.float32) + self.step_bias.astype(jnp.float32)))

    def _scanned(
        self, mixed: Float[Array, "batch length channels"], step: Float[Array, "batch length heads"]
    ) -> Scanned:
        """From the channels after their convolution, without its bias."""
        inner = self.norm.weight.shape[0]
        state = (mixed.shape[-1] - inner) // 2
        active = jax.nn.silu(mixed + self.conv_bias.astype(jnp.float32))
        values, writes, reads = jnp.split(active, [inner, inner + state], axis=-1)
        return Scanned(values.reshape(*values.shape[:2], -1, HEAD), step, writes, reads)

    def _out(
        self,
        read: Float[Array, "batch length heads head_dim"],
        scanned: Scanned,
        projected: Projected,
        x: Float[Array, "batch length dim"],
    ) -> Float[Array, "batch length dim"]:
        read = read + self.skip.astype(jnp.float32)[:, None] * scanned.values
        gated = read.reshape(*read.shape[:2], -1) * jax.nn.silu(projected.gate.astype(jnp.float32))
        return self.project_out(self.norm(gated).astype(x.dtype))
