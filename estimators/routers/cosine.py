"""H-Net's router, and greedy actions for any router."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from estimators.base import AbstractRouter, Boundaries, Layout, Routed, SamplingOptions
from estimators.bounds import Rate, check_bounds
from estimators.decode_state import last_positions
from estimators.equations import (
    routing_probability,
)


class CosineRouter(AbstractRouter):
    r"""A boundary where a position is unlike the one before: $p_t = \tfrac12(1 - \cos(W_q X_{t-1}, W_k X_t))$ (H-Net eq. 4).

    Both projections start as the identity. With a key, boundaries are drawn from $\mathrm{Bernoulli}(p_t)$; H-Net itself is
    greedy, which is `Greedy(CosineRouter(dim))`. In float32.
    """

    query: Float[Array, "dim dim"]
    key: Float[Array, "dim dim"]
    target_rate: Rate = eqx.field(static=True)

    def __init__(self, dim: int, *, target_rate: float = 0.2):
        """`target_rate` only determines capacities; the objective trains the rate. Raises `ValueError` for one outside (0, 1)."""
        self.query, self.key = jnp.eye(dim, dtype=jnp.float32), jnp.eye(dim, dtype=jnp.float32)
        self.target_rate = target_rate

    def __check_init__(self):
        check_bounds(self)

    @property
    def dim(self) -> int | None:
        return self.query.shape[1]

    @property
    def rate(self) -> float | None:
        return self.target_rate

    @property
    def initial_rate(self) -> float | None:
        """At least one half: with a fresh encoder, neighbouring states are about as often similar as dissimilar."""
        return max(self.target_rate, 0.5)

    def init_state(self, batch: int) -> Float[Array, "batch 1 dim"]:
        """The last hidden state."""
        return jnp.zeros((batch, 1, self.query.shape[0]), jnp.float32)

    def route(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        options: SamplingOptions,
        state: Float[Array, "batch 1 dim"] | None = None,
    ) -> Routed:
        wide = hidden.astype(jnp.float32)
        if state is None:
            return Routed(self.drawn(self.probs(wide, layout.starts), layout, options), None)
        probs = self.probs(jnp.concatenate([state.astype(jnp.float32), wide], axis=1))[:, 1:]
        boundaries = self.drawn(jnp.where(layout.starts, 1.0, probs), layout, options)
        return Routed(boundaries, last_positions(state, hidden, layout.lengths))

    def probs(
        self, wide: Float[Array, "batch length dim"], starts: Bool[Array, "batch length"] | None = None
    ) -> Float[Array, "batch length"]:
        """The probabilities p."""
        return routing_probability(wide @ self.query.T, wide @ self.key.T, starts)

    def drawn(self, probs: Float[Array, "batch length"], layout: Layout, options: SamplingOptions) -> Boundaries:
        """Boundaries with these probabilities."""
        actions = options.bernoulli(probs, layout)
        # Equal or opposite states have infinite log-odds; clipping keeps policy losses finite.
        inside = jnp.clip(probs, 1e-4, 1.0 - 1e-4)
        logits = jnp.log(inside) - jnp.log1p(-inside)
        return Boundaries(actions, logits, probs, layout.free, layout.starts)


class Greedy(AbstractRouter):
    """The greedy actions of another router (`probs > 0.5`), whatever the key."""

    router: AbstractRouter

    @property
    def dim(self) -> int | None:
        return self.router.dim

    @property
    def rate(self) -> float | None:
        return self.router.rate

    @property
    def initial_rate(self) -> float | None:
        """At least one half: initial probabilities must lie around one half for greedy actions to vary."""
        return None if self.rate is None else max(self.rate, 0.5)

    def init_state(self, batch: int) -> PyTree[Array]:
        return self.router.init_state(batch)

    def route(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        options: SamplingOptions,
        state: PyTree[Array] = None,
    ) -> Routed:
        return self.router.route(hidden, layout, dataclasses.replace(options, key=None), state)
