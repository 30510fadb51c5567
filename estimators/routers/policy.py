"""The score-function paper's policy: linear, with a memory of its last actions."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from estimators.base import AbstractRouter, Boundaries, Layout, Routed, SamplingOptions
from estimators.bounds import Lags, Positive, Rate, require_within
from estimators.decode_state import last_positions
from estimators.equations import (
    logit,
    soft_cap,
    windowed_logits,
)


class WindowedPolicy(AbstractRouter):
    r"""A linear policy that sees its last `window` actions (SFE eq. 16-19).

    $l_i = \mathrm{softcap}\big((W_0 X_i + \sum_{j=1}^{w} a_{i-j} W_j X_i)/D + \mathrm{logit}(\pi_{target})\big)$, capped in
    training only, and $a_i \sim \mathrm{Bernoulli}(\sigma(l_i))$. `window = 0` is a policy without memory. Actions are sampled
    sequentially; given the actions, all logits are computed in parallel, and only this computation carries gradients.

    The weights start at zero, so that the probability is the target rate everywhere: a policy with random initial preferences
    may settle on them before it has learned which boundaries help.
    """

    weight: Float[Array, "lags dim"]
    target_rate: float = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    cap: float = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        *,
        window: int = 7,
        target_rate: float = 0.2,
        scale: float = 16.0,
        cap: float = 6.0,
    ):
        """`scale` is D; `cap` bounds the logits in training. Raises `ValueError` for a window outside 0 … 1024, a rate
        outside (0, 1) or beyond the cap, and a scale or cap that is not positive."""
        require_within("window", window, Lags)
        for name, value, kind in (
            ("target_rate", target_rate, Rate),
            ("scale", scale, Positive),
            ("cap", cap, Positive),
        ):
            require_within(name, value, kind)
        if abs(logit(target_rate)) >= cap:
            raise ValueError(
                f"a target rate of {target_rate} has the logit {logit(target_rate):.3g}, beyond the cap of {cap}: raise the cap"
            )
        self.weight = jnp.zeros((1 + window, dim), jnp.float32)
        self.target_rate = target_rate
        self.scale = scale
        self.cap = cap

    @property
    def dim(self) -> int | None:
        return self.weight.shape[1]

    @property
    def rate(self) -> float | None:
        return self.target_rate

    def projections(self, hidden: Float[Array, "batch length dim"]) -> Float[Array, "batch length lags"]:
        r"""$W_j X_i / D$ for every lag j, with $\mathrm{logit}(\pi_{target})$ added at lag 0 (SFE eq. 17-18), in float32."""
        scaled = hidden.astype(jnp.float32) @ self.weight.T / self.scale
        return scaled.at[..., 0].add(logit(self.target_rate))

    def init_state(self, batch: int) -> Bool[Array, "batch window"]:
        """The last `window` actions, oldest first."""
        return jnp.zeros((batch, self.weight.shape[0] - 1), bool)

    def route(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        options: SamplingOptions,
        state: Bool[Array, "batch window"] | None = None,
    ) -> Routed:
        projections, starts, actions = self.projections(hidden), layout.starts, options.actions
        if state is not None:
            projections = projections.at[..., 0].add(_of_past_actions(projections, state))
        cap = self.cap if options.training else None
        if actions is None:
            uniforms = options.uniforms(layout)
            actions = options.sampler(jax.lax.stop_gradient(projections), uniforms, starts, cap, options.limits).actions
        actions = (actions | starts) & layout.mask
        logits = soft_cap(windowed_logits(projections, actions, starts), cap)
        boundaries = Boundaries(actions, logits, jax.nn.sigmoid(logits), layout.free, starts)
        return Routed(boundaries, None if state is None else last_positions(state, actions, layout.lengths))


def _of_past_actions(
    projections: Float[Array, "batch length lags"], past: Bool[Array, "batch window"]
) -> Float[Array, "batch length"]:
    """What the actions before the first of these positions add to the logits."""
    batch, length, window = *projections.shape[:2], past.shape[1]
    actions = jnp.concatenate([past, jnp.zeros((batch, length), bool)], axis=1)
    padded = jnp.pad(projections.at[..., 0].set(0.0), ((0, 0), (window, 0), (0, 0)))
    return windowed_logits(padded, actions, jnp.zeros_like(actions))[:, window:]
