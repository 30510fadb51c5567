"""A two-layer perceptron at each position, relaxed by Gumbel noise."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from estimators.base import AbstractPositionwiseRouter, Boundaries, Layout, SamplingOptions
from estimators.bounds import Positive, Rate, Width, check_bounds, require_within
from estimators.equations import (
    gumbel_sigmoid,
    logit,
    straight_through,
)


class MLPRouter(AbstractPositionwiseRouter):
    r"""A two-layer perceptron at each position, sampled with Gumbel noise (DPT; authors' code).

    $l_i = w_2 \cdot \mathrm{GELU}(W_1 X_i + b_1) + b_2$, $s_i = \sigma((l_i + \mathrm{logit}(u_i))/\tau)$, $a_i = 1[s_i > 1/2]$,
    which is a draw from $\mathrm{Bernoulli}(\sigma(l_i))$; `relaxed` is $a$ with the gradient of $s$. The last bias starts
    at the logit of `start`, by default the target rate. In float32.
    """

    weight_in: Float[Array, "inner dim"]
    bias_in: Float[Array, " inner"]
    weight_out: Float[Array, " inner"]
    bias_out: Float[Array, ""]
    target_rate: Rate = eqx.field(static=True)
    temperature: Positive = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        inner: int | None = None,
        *,
        target_rate: float = 0.2,
        temperature: float = 0.5,
        start: float | None = None,
        key: PRNGKeyArray,
    ):
        """`inner` is the width of the hidden layer, by default `dim`; `temperature` is τ; `start` is the approximate initial
        probability, by default the target rate. Under `Greedy`, start at one half: lower probabilities give no boundaries.
        Raises `ValueError` for a temperature that is not positive or a rate outside (0, 1)."""
        inner = dim if inner is None else inner
        require_within("inner", inner, Width)
        key_in, key_out = jax.random.split(key)
        self.weight_in = jax.random.normal(key_in, (inner, dim), jnp.float32) * dim**-0.5
        self.bias_in = jnp.zeros(inner, jnp.float32)
        self.weight_out = jax.random.normal(key_out, (inner,), jnp.float32) * 0.1 * inner**-0.5
        self.bias_out = jnp.asarray(logit(target_rate if start is None else start), jnp.float32)
        self.target_rate = target_rate
        self.temperature = temperature

    def __check_init__(self):
        check_bounds(self)

    @property
    def dim(self) -> int | None:
        return self.weight_in.shape[1]

    @property
    def rate(self) -> float | None:
        return self.target_rate

    def logits(self, hidden: Float[Array, "batch length dim"]) -> Float[Array, "batch length"]:
        """The logits l."""
        inner = jax.nn.gelu(hidden.astype(jnp.float32) @ self.weight_in.T + self.bias_in, approximate=False)
        return inner @ self.weight_out + self.bias_out

    def boundaries(
        self, hidden: Float[Array, "batch length dim"], layout: Layout, options: SamplingOptions
    ) -> Boundaries:
        logits = self.logits(hidden)
        # Given actions come without noise: relax them at u = 1/2, where the noise is zero.
        uniforms = options.uniforms(layout) if options.actions is None else jnp.full(logits.shape, 0.5, jnp.float32)
        soft = gumbel_sigmoid(logits, uniforms, self.temperature)
        drawn = soft > 0.5 if options.actions is None else options.actions
        actions = (drawn | layout.starts) & layout.mask
        decided = layout.free
        relaxed = straight_through(actions, jnp.where(decided, soft, 0.0))
        return Boundaries(actions, logits, jax.nn.sigmoid(logits), decided, layout.starts, relaxed)
