"""Boundaries at random positions."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from estimators.base import (
    AbstractPositionwiseRouter,
    Boundaries,
    Layout,
    SamplingOptions,
)
from estimators.bounds import Rate, check_bounds
from estimators.sharding import batch_uniform


class Bernoulli(AbstractPositionwiseRouter):
    """An independent boundary at every byte, with the same probability everywhere."""

    target_rate: Rate = eqx.field(static=True)

    def __check_init__(self):
        check_bounds(self)

    @property
    def rate(self) -> float | None:
        return self.target_rate

    def boundaries(
        self, hidden: Float[Array, "batch length dim"], layout: Layout, options: SamplingOptions
    ) -> Boundaries:
        probs = jnp.broadcast_to(options.rate(self.target_rate), layout.mask.shape)
        actions = options.bernoulli(probs, layout)
        return Boundaries(actions, jnp.log(probs) - jnp.log1p(-probs), probs, layout.free, layout.starts)


class UniformRouter(AbstractPositionwiseRouter):
    r"""Exactly $\mathrm{round}(n\,\pi)$ boundaries among the n bytes of a sequence, drawn uniformly without replacement.

    The first byte of each document and the last byte of the sequence are forced and count towards this number (authors'
    code). With one key per sequence, no draw may depend on later positions: each byte is then drawn independently, with
    probability π. Without a key it is greedy, which means no boundaries for rates up to one half. Where constraints allow
    boundaries at m of the bytes only, there are $\mathrm{round}(m\,\pi)$ among these, before limits on sizes apply.
    """

    target_rate: Rate = eqx.field(static=True)

    def __check_init__(self):
        check_bounds(self)

    @property
    def rate(self) -> float | None:
        return self.target_rate

    def boundaries(
        self, hidden: Float[Array, "batch length dim"], layout: Layout, options: SamplingOptions
    ) -> Boundaries:
        mask, starts = layout.mask, layout.starts
        rate = options.rate(self.target_rate)
        probs = jnp.broadcast_to(rate, mask.shape)
        actions = options.actions
        if actions is None:
            if options.key is None or options.by_sequence:
                actions = options.uniforms(layout) < probs
            else:
                allowed = layout.mask if options.limits is None else layout.mask & options.limits.possible
                actions = self.by_lot(layout, allowed, rate, options.key)
        actions = (actions | starts) & mask
        return Boundaries(actions, jnp.log(probs) - jnp.log1p(-probs), probs, jnp.zeros_like(mask), starts)

    def by_lot(
        self, layout: Layout, allowed: Bool[Array, "batch length"], rate: Float[Array, ""], key: PRNGKeyArray
    ) -> Bool[Array, "batch length"]:
        """`round(n·rate)` boundaries among the n `allowed` bytes of each sequence: forced ones first, then others drawn without
        replacement."""
        there, mask = layout.mask, allowed | layout.starts
        last = mask & (jnp.cumsum(there, axis=1) == jnp.sum(there, axis=1, keepdims=True))
        priority = jnp.where(layout.starts | last, 2.0, batch_uniform(key, mask.shape))
        order = jnp.argsort(jnp.where(mask, priority, -1.0), axis=1, descending=True)
        count = jnp.sum(mask, axis=1, keepdims=True).astype(jnp.float32)
        budget = jnp.round(count * rate).astype(jnp.int32)
        return jnp.argsort(order, axis=1) < budget
