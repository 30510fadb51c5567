"""Mamba-2: a layer with one state matrix per head, so that time is linear in the length and a decoding step takes constant
time."""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from estimators.decode_state import last_positions
from unet.attention import AbstractMixer, BlockContext, LayerOutput
from unet.layers import Linear, ScaleNorm
from unet.ops.ssd import ssd

HEAD = 64
"""Width of a head."""


class MambaState(eqx.Module):
    """The last inputs of the convolution, the oldest first, and the state h of the recurrence, in float32."""

    conv: Float[Array, "batch conv_width_less_one channels"]
    ssm: Float[Array, "batch heads head_dim state"]


class Mamba2(AbstractMixer):
    r"""A Mamba-2 mixer with one group (Dao and Gu 2024), as H-Net uses it.

    1. $(z, xBC, dt) = W_{in} u$
    2. $xBC \leftarrow \mathrm{silu}(\mathrm{conv}(xBC) + b_{conv})$, a causal depthwise convolution; $(x, B, C) = xBC$
    3. $\Delta = \mathrm{softplus}(dt + b_{dt})$, $A = -e^{A_{log}}$
    4. $h_t = e^{\Delta_t A} h_{t-1} + \Delta_t x_t B_t^\top$, $y_t = h_t C_t + D x_t$ for each head
    5. $W_{out} N(y \odot \mathrm{silu}(z))$ with N a `ScaleNorm`

    Step 4 discretises $\dot h = A h + x B^\top$ with steps of $\Delta$: exactly in the decay, to first order in the input.
    Everything between the two projections is float32.
    """

    project_in: Linear
    conv_weight: Float[Array, "channels conv_width"]
    conv_bias: Float[Array, " channels"]
    dt_bias: Float[Array, " heads"]
    A_log: Float[Array, " heads"]
    D: Float[Array, " heads"]
    norm: ScaleNorm
    project_out: Linear

    def __init__(self, dim: int, *, state: int = 128, conv_width: int = 4, expand: int = 2, key: PRNGKeyArray):
        r"""`state`: columns of a head's state matrix h (d_state). `conv_width`: positions that the convolution sees, its own
        included. The inner width is `expand` times `dim`, in heads of 64. As published, $\Delta$ starts log-uniform in [.001,
        .1] and -A uniform in [1, 16]. Raises `ValueError` if the inner width is not a multiple of 64."""
        inner = expand * dim
        if inner % HEAD:
            raise ValueError(f"the inner width of a Mamba-2 layer must be a multiple of {HEAD}; got {expand} x {dim}")
        heads, channels = inner // HEAD, inner + 2 * state
        key_in, key_conv, key_dt, key_a, key_out = jax.random.split(key, 5)
        self.project_in = Linear(dim, inner + channels + heads, key=key_in)
        bound = conv_width**-0.5
        key_weight, key_bias = jax.random.split(key_conv)
        self.conv_weight = jax.random.uniform(
            key_weight, (channels, conv_width), jnp.float32, minval=-bound, maxval=bound
        )
        self.conv_bias = jax.random.uniform(key_bias, (channels,), jnp.float32, minval=-bound, maxval=bound)
        dt = jnp.exp(jax.random.uniform(key_dt, (heads,), jnp.float32, minval=math.log(1e-3), maxval=math.log(1e-1)))
        # The inverse of softplus.
        self.dt_bias = dt + jnp.log(-jnp.expm1(-dt))
        self.A_log = jnp.log(jax.random.uniform(key_a, (heads,), jnp.float32, minval=1.0, maxval=16.0))
        self.D = jnp.ones((heads,), jnp.float32)
        self.norm = ScaleNorm(inner)
        self.project_out = Linear(inner, dim, key=key_out)

    @property
    def rotary_dim(self) -> int | None:
        return None

    def init_state(self, batch: int, window: int | None = None) -> MambaState:
        channels, conv_width = self.conv_weight.shape
        heads, inner = self.D.shape[0], self.norm.weight.shape[0]
        h = jnp.zeros((batch, heads, HEAD, (channels - inner) // 2), jnp.float32)
        return MambaState(jnp.zeros((batch, conv_width - 1, channels), jnp.float32), h)

    def __call__(
        self, x: Float[Array, "batch length dim"], context: BlockContext, state: MambaState | None = None
    ) -> LayerOutput:
        layout, conv, h = context.layout, None if state is None else state.conv, None if state is None else state.ssm
        channels, inner = self.conv_bias.shape[0], self.norm.weight.shape[0]

        # 1. z: (b, l, inner); xBC: (b, l, inner + 2 state); dt: (b, l, heads)
        z, inputs, dt = jnp.split(self.project_in(x), [inner, inner + channels], axis=-1)

        # 2. values x: (b, l, heads, 64); B, C: (b, l, state)
        mixed = self._convolved(inputs, conv, layout.document_positions)
        values, B, C = jnp.split(jax.nn.silu(mixed), [inner, (inner + channels) // 2], axis=-1)
        values = values.reshape(*values.shape[:2], -1, HEAD)

        # 3. Padding gets dt = 0, so it neither decays the state nor adds to it.
        dt = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias.astype(jnp.float32))
        dt = jnp.where(layout.mask[..., None], dt, 0.0)
        A = -jnp.exp(self.A_log.astype(jnp.float32))

        # 4. y: (b, l, heads, 64); h: (b, heads, 64, state)
        scanned = ssd(dt[..., None] * values, dt * A, B, C, layout.starts, h)
        y = scanned.y + self.D.astype(jnp.float32)[:, None] * values

        # 5. (b, l, dim)
        gated = y.reshape(*y.shape[:2], -1) * jax.nn.silu(z.astype(jnp.float32))
        out = self.project_out(self.norm(gated).astype(x.dtype))
        if state is None:
            return LayerOutput(out, None)
        return LayerOutput(out, MambaState(last_positions(state.conv, inputs, layout.lengths), scanned.h))

    def _convolved(
        self,
        inputs: Float[Array, "batch length channels"],
        before: Float[Array, "batch conv_width_less_one channels"] | None,
        document_positions: Int[Array, "batch length"],
    ) -> Float[Array, "batch length channels"]:
        """The convolution, in float32 and within documents. `document_positions`: the index of each position in its document."""
        length, width = inputs.shape[1], self.conv_weight.shape[1]
        if before is None:
            padded = jnp.pad(inputs, ((0, 0), (width - 1, 0), (0, 0)))
        else:
            padded = jnp.concatenate([before.astype(inputs.dtype), inputs], axis=1)
        mixed = jnp.zeros(inputs.shape, jnp.float32)
        for back in range(width):
            shifted = padded[:, width - 1 - back :][:, :length].astype(jnp.float32)
            weight = self.conv_weight[:, width - 1 - back].astype(jnp.float32)
            mixed = mixed + jnp.where((document_positions >= back)[..., None], shifted, 0.0) * weight
        return mixed + self.conv_bias.astype(jnp.float32)
