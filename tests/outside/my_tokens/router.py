"""A router: boundaries where the hidden state is long.

python -m experiments.run --estimator my_tokens.router:NormRouter --norm-router.start 0.5
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from estimators import AbstractPositionwiseRouter, Boundaries, Layout, SamplingOptions
from estimators.equations import logit


class NormRouter(AbstractPositionwiseRouter):
    r"""$l_i = w \log\lVert X_i\rVert^2 + \mathrm{logit}(\pi) + b$, with one learned slope w and offset b."""

    slope: Float[Array, ""]
    offset: Float[Array, ""]
    target_rate: float = eqx.field(static=True)
    start: float = eqx.field(static=True)
    """The slope before training."""

    def __init__(self, target_rate: float, start: float = 0.0):
        self.slope, self.offset = jnp.asarray(start, jnp.float32), jnp.zeros(())
        self.target_rate, self.start = target_rate, start

    @property
    def rate(self) -> float | None:
        return self.target_rate

    def boundaries(
        self, hidden: Float[Array, "batch length dim"], layout: Layout, options: SamplingOptions
    ) -> Boundaries:
        size = jnp.log(1e-6 + jnp.mean(hidden.astype(jnp.float32) ** 2, axis=-1))
        logits = self.slope * size + self.offset + logit(self.target_rate)
        probs = jax.nn.sigmoid(logits)
        return Boundaries(options.bernoulli(probs, layout), logits, probs, layout.free, layout.starts)
