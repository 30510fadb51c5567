"""Routers that learn. Each maps hidden states to boundary logits; the fixed rules are in `fixed.py`."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from estimators.base import AbstractRouter, Boundaries, Layout, Sampler
from estimators.equations import logit, soft_cap, windowed_logits


class WindowedPolicy(AbstractRouter):
    r"""A linear policy that sees the last `window` boundaries (SFE eq. 16-19).

    $l_i = \mathrm{softcap}\big((W_0 X_i + \sum_{j=1}^{w} a_{i-j} W_j X_i)/D + \mathrm{logit}(\pi_{target})\big)$, capped in
    training only, and $a_i \sim \mathrm{Bernoulli}(\sigma(l_i))$. `window = 0` is a policy without memory. Actions are drawn
    in sequence; given them all logits are computed at once, and only that computation carries gradients.

    The weights start at zero, so every byte starts at the target rate: a policy that starts with preferences of its own may
    settle on them before it has seen what boundaries are good for.
    """

    weight: Float[Array, "taps dim"]
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
        """`scale` is D; `cap` bounds the training logits. Raises `ValueError` for a window below 0, a rate outside (0, 1),
        or a scale or cap that is not positive."""
        if window < 0:
            raise ValueError(f"window counts past boundaries and cannot be negative; got {window}")
        if scale <= 0 or cap <= 0:
            raise ValueError(f"scale and cap must be positive; got scale {scale} and cap {cap}")
        if abs(logit(target_rate)) >= cap:
            raise ValueError(f"a target rate of {target_rate} lies beyond logits capped at {cap}")
        self.weight = jnp.zeros((1 + window, dim))
        self.target_rate = target_rate
        self.scale = scale
        self.cap = cap

    @property
    def rate(self) -> float | None:
        return self.target_rate

    def projections(self, hidden: Float[Array, "batch length dim"]) -> Float[Array, "batch length taps"]:
        r"""$W_j X_i / D$ for every tap, with $\mathrm{logit}(\pi_{target})$ added to tap 0 (SFE eq. 17-18), in float32."""
        scaled = hidden.astype(jnp.float32) @ self.weight.T / self.scale
        return scaled.at[..., 0].add(logit(self.target_rate))

    def __call__(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        *,
        sampler: Sampler,
        key: PRNGKeyArray | None,
        actions: Bool[Array, "batch length"] | None = None,
        training: bool = False,
    ) -> Boundaries:
        projections = self.projections(hidden)
        starts = layout.starts
        cap = self.cap if training else None
        if actions is None:
            shape = layout.mask.shape
            uniforms = jnp.full(shape, 0.5) if key is None else jax.random.uniform(key, shape)
            actions = sampler(jax.lax.stop_gradient(projections), uniforms, starts, cap).actions
        actions = (actions | starts) & layout.mask
        logits = windowed_logits(projections, actions, starts)
        if cap is not None:
            logits = soft_cap(logits, cap)
        return Boundaries(actions, logits, jax.nn.sigmoid(logits), layout.mask & ~starts)
