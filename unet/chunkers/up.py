"""Upsamplers: how the token level's outputs come back to the positions."""

from __future__ import annotations

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from estimators.base import Boundaries, Tokens, Upsampled
from unet.chunkers.chunker import AbstractUpsampler, Hidden, Mask, Outputs, Vector
from unet.ops import Implementation, smooth, token_of, upsample


def spread(outputs: Outputs, actions: Mask, before: Vector | None, implementation: Implementation | None) -> Hidden:
    r"""$Y'_{\mathrm{token\_of}(i)}$, with `before` at the positions before the first of these tokens (None: zero)."""
    back = upsample(outputs, actions, implementation=implementation)
    if before is None:
        return back
    return jnp.where(token_of(actions)[..., None] >= 0, back, before.astype(back.dtype))


def last_output(outputs: Outputs, tokens: Tokens, before: Vector) -> Vector:
    """The output of the last token of each sequence, or `before` if there is none among these."""
    index = (tokens.lengths - 1)[:, None, None]
    last = jnp.take_along_axis(outputs, jnp.maximum(index, 0), axis=1, mode="clip")
    return jnp.where(index >= 0, last, before.astype(outputs.dtype))


class Distribute(AbstractUpsampler):
    r"""Adds each token's output to the positions from its boundary to the next (SFE eq. 8).

    $Y_i = X_i + Y'_{\mathrm{token\_of}(i)}$. No gradient reaches the boundaries.
    """

    implementation: Implementation | None = eqx.field(static=True, default=None)

    def init_state(self, batch: int, dim: int) -> Vector:
        """The last token's output."""
        return jnp.zeros((batch, 1, dim), jnp.float32)

    def __call__(
        self, outputs: Outputs, tokens: Tokens, hidden: Hidden, boundaries: Boundaries, *, state: Vector | None = None
    ) -> Upsampled:
        back = hidden + spread(outputs, boundaries.actions, state, self.implementation)
        return Upsampled(back, None if state is None else last_output(outputs, tokens, state))


class Deviation(AbstractUpsampler):
    r"""Adds only the change that the token level made (an earlier version of the authors' code):
    $Y_i = X_i + (Y' - X')_{\mathrm{token\_of}(i)}$."""

    implementation: Implementation | None = eqx.field(static=True, default=None)

    def init_state(self, batch: int, dim: int) -> Vector:
        """The change at the last token."""
        return Distribute().init_state(batch, dim)

    def __call__(
        self, outputs: Outputs, tokens: Tokens, hidden: Hidden, boundaries: Boundaries, *, state: Vector | None = None
    ) -> Upsampled:
        # Before the first token there is no change.
        changed = outputs - tokens.values
        return Distribute(self.implementation)(changed, tokens, hidden, boundaries, state=state)


class Insert(AbstractUpsampler):
    r"""Adds each token's output at the position that closed it, and nowhere else (SpaceByte): $Y_i = X_i + a_i\,
    Y'_{\mathrm{token\_of}(i)}$. The decoder carries it on. No gradient reaches the boundaries."""

    implementation: Implementation | None = eqx.field(static=True, default=None)

    def init_state(self, batch: int, dim: int) -> None:
        return None

    def __call__(
        self, outputs: Outputs, tokens: Tokens, hidden: Hidden, boundaries: Boundaries, *, state: None = None
    ) -> Upsampled:
        back = spread(outputs, boundaries.actions, None, self.implementation)
        return Upsampled(hidden + jnp.where(boundaries.actions[..., None], back, jnp.zeros((), back.dtype)), None)


class Projection(eqx.Module):
    """H-Net's residual projection: a linear layer with a bias, in float32, its weight zero at first (H-Net eq. 3)."""

    weight: Float[Array, "dim dim"]
    bias: Float[Array, " dim"]

    def __init__(self, dim: int, *, key: PRNGKeyArray | None = None):
        """With a key the bias starts as in the released code, which keeps PyTorch's initial value: uniform within `dim**-0.5`.
        Without one it starts at zero."""
        self.weight, bound = jnp.zeros((dim, dim), jnp.float32), dim**-0.5
        self.bias = (
            jnp.zeros(dim, jnp.float32)
            if key is None
            else jax.random.uniform(key, (dim,), jnp.float32, minval=-bound, maxval=bound)
        )

    def __call__(self, hidden: Hidden) -> Hidden:
        """$Wx + b$ in float32."""
        return hidden.astype(jnp.float32) @ self.weight.T + self.bias


class Smooth(AbstractUpsampler):
    r"""Smooths the tokens, weights them by confidence and distributes them (H-Net eq. 5-9).

    $Y_i = r(X_i) + w_i\,\bar z_{\mathrm{token\_of}(i)}$. $\bar z$ is the moving average `unet.ops.smooth` of the token outputs,
    with the probabilities of their boundaries (`smoothing` False: the outputs themselves). `weighting` selects $w_i$:
    `straight-through`, 1 with the gradient of the confidence $c_i$; `confidence`, $c_i$ itself; `none`, 1. The residual r is
    the identity, or the `projection` if there is one; then the sum is computed in float32 and returned in the dtype of X.
    """

    projection: Projection | None = None
    smoothing: bool = eqx.field(static=True, default=True)
    weighting: Literal["straight-through", "confidence", "none"] = eqx.field(static=True, default="straight-through")
    implementation: Implementation | None = eqx.field(static=True, default=None)

    @property
    def passes_gradient_to(self) -> frozenset[str]:
        return frozenset({"probs"} if self.smoothing or self.weighting != "none" else ())

    def init_state(self, batch: int, dim: int) -> Vector:
        """The last average, in float32."""
        return jnp.zeros((batch, 1, dim), jnp.float32)

    def __call__(
        self, outputs: Outputs, tokens: Tokens, hidden: Hidden, boundaries: Boundaries, *, state: Vector | None = None
    ) -> Upsampled:
        averages = self.averages(outputs if state is None else outputs.astype(jnp.float32), tokens, boundaries, state)
        back = spread(averages.astype(outputs.dtype), boundaries.actions, state, self.implementation)
        update = None if state is None else last_output(averages, tokens, state)
        return Upsampled(self.combined(back, hidden, boundaries), update)

    def averages(
        self, outputs: Outputs, tokens: Tokens, boundaries: Boundaries, before: Vector | None = None
    ) -> Outputs:
        r"""$\bar z$, continuing from the average `before` these tokens."""
        if not self.smoothing:
            return outputs
        probs = jnp.take_along_axis(boundaries.probs, tokens.positions, axis=1, mode="clip")
        starts = jnp.take_along_axis(boundaries.starts, tokens.positions, axis=1, mode="clip")
        # A forced boundary is certain, whatever its probability under the policy. H-Net's own router already says 1.
        probs = jnp.where(starts, 1.0, probs)
        return smooth(outputs, probs, starts, initial=before, implementation=self.implementation)

    def combined(self, back: Hidden, hidden: Hidden, boundaries: Boundaries) -> Hidden:
        """Y, from the average `back` at each position."""
        if self.projection is not None:
            back = back.astype(jnp.float32)
        if self.weighting != "none":
            weight = boundaries.confidence
            if self.weighting == "straight-through":
                weight = 1.0 + (weight - jax.lax.stop_gradient(weight))
            back = back * weight.astype(back.dtype)[..., None]
        return (back + (hidden if self.projection is None else self.projection(hidden))).astype(hidden.dtype)


class LeaveToDecoder(AbstractUpsampler):
    """Leaves the positions unchanged: $Y_i = X_i$. The decoder's blocks attend to the tokens instead (BLT).

    For stages whose decoder has `Attending` blocks; without them the token level has no effect.
    """

    @property
    def widens(self) -> bool:
        return True

    def init_state(self, batch: int, dim: int) -> None:
        return None

    def __call__(
        self, outputs: Outputs, tokens: Tokens, hidden: Hidden, boundaries: Boundaries, *, state: None = None
    ) -> Upsampled:
        return Upsampled(hidden, None)
