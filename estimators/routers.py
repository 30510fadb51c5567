"""Routers that learn. Each maps hidden states to boundary logits; the fixed rules are in `fixed.py`."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from estimators.base import AbstractRouter, AbstractRowRouter, Boundaries, Draw, Layout, Routed
from estimators.equations import (
    action_log_prob,
    gumbel_sigmoid,
    logit,
    routing_probability,
    soft_cap,
    straight_through,
    windowed_logits,
)


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

    def __call__(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Boundaries:
        projections = self.projections(hidden)
        starts, actions = layout.starts, draw.actions
        cap = self.cap if draw.training else None
        if actions is None:
            uniforms = draw.uniforms(layout)
            actions = draw.sampler(jax.lax.stop_gradient(projections), uniforms, starts, cap).actions
        actions = (actions | starts) & layout.mask
        logits = windowed_logits(projections, actions, starts)
        if cap is not None:
            logits = soft_cap(logits, cap)
        return Boundaries(actions, logits, jax.nn.sigmoid(logits), layout.mask & ~starts, starts)

    def prefill(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Routed:
        """The memory is the last `window` actions, the latest first."""
        boundaries = self(hidden, layout, draw)
        count = jnp.sum(layout.mask, axis=1, keepdims=True, dtype=jnp.int32)
        place = count - 1 - jnp.arange(self.weight.shape[0] - 1, dtype=jnp.int32)
        actions = jnp.take_along_axis(boundaries.actions, jnp.maximum(place, 0), axis=1, mode="clip")
        return Routed(boundaries, actions & (place >= 0))

    def step(
        self, hidden: Float[Array, "batch 1 dim"], layout: Layout, draw: Draw, memory: Bool[Array, "batch window"]
    ) -> Routed:
        projections = self.projections(hidden)[:, 0]
        logits = projections[:, :1] + jnp.sum(jnp.where(memory, projections[:, 1:], 0.0), axis=1, keepdims=True)
        if draw.training:
            logits = soft_cap(logits, self.cap)
        probs = jax.nn.sigmoid(logits)
        actions = draw.bernoulli(probs, layout)
        after = jnp.concatenate([actions, memory], axis=1)[:, : memory.shape[1]]
        return Routed(Boundaries(actions, logits, probs, layout.free, layout.starts), after)


class MLPRouter(AbstractRowRouter):
    r"""A two-layer perceptron on each row, drawn by Gumbel noise (DPT; authors' code).

    $l_i = w_2 \cdot \mathrm{GELU}(W_1 X_i + b_1) + b_2$, $s_i = \sigma((l_i + \mathrm{logit}(u_i))/\tau)$, $a_i = 1[s_i > 1/2]$,
    which is a draw from $\mathrm{Bernoulli}(\sigma(l_i))$; `relaxed` is $a$ with the gradient of $s$. The last bias starts
    at the logit of the target rate (or of `start`), so that training starts near it. In float32.
    """

    weight_in: Float[Array, "inner dim"]
    bias_in: Float[Array, " inner"]
    weight_out: Float[Array, " inner"]
    bias_out: Float[Array, ""]
    target_rate: float = eqx.field(static=True)
    temperature: float = eqx.field(static=True)

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
        """`inner` is the width of the hidden layer, by default `dim`; `temperature` is τ; `start` the probability that fresh
        rows have, about: by default the target rate. `Likelier` needs one half, or there would be no boundary at first.
        Raises `ValueError` for a temperature that is not positive or a rate outside (0, 1)."""
        if temperature <= 0:
            raise ValueError(f"the temperature must be positive; got {temperature}")
        inner = dim if inner is None else inner
        key_in, key_out = jax.random.split(key)
        self.weight_in = jax.random.normal(key_in, (inner, dim)) * dim**-0.5
        self.bias_in = jnp.zeros(inner)
        self.weight_out = jax.random.normal(key_out, (inner,)) * 0.1 * inner**-0.5
        self.bias_out = jnp.asarray(logit(target_rate if start is None else start))
        self.target_rate = target_rate
        self.temperature = temperature

    @property
    def rate(self) -> float | None:
        return self.target_rate

    def logits(self, hidden: Float[Array, "batch length dim"]) -> Float[Array, "batch length"]:
        """l."""
        inner = jax.nn.gelu(hidden.astype(jnp.float32) @ self.weight_in.T + self.bias_in, approximate=False)
        return inner @ self.weight_out + self.bias_out

    def __call__(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Boundaries:
        logits = self.logits(hidden)
        # Given actions have no noise of their own: their relaxation is that of the likelier draw.
        uniforms = draw.uniforms(layout) if draw.actions is None else jnp.full(logits.shape, 0.5)
        soft = gumbel_sigmoid(logits, uniforms, self.temperature)
        drawn = soft > 0.5 if draw.actions is None else draw.actions
        actions = (drawn | layout.starts) & layout.mask
        decided = layout.free
        relaxed = straight_through(actions, jnp.where(decided, soft, 0.0))
        return Boundaries(actions, logits, jax.nn.sigmoid(logits), decided, layout.starts, relaxed)


class CosineRouter(AbstractRouter):
    r"""A boundary where a row is unlike the one before it: $p_t = \tfrac12(1 - \cos(W_q X_{t-1}, W_k X_t))$ (H-Net eq. 4).

    Both projections start as the identity. With a key the boundaries are draws from $\mathrm{Bernoulli}(p_t)$; H-Net itself
    takes the likelier action, which is `Likelier(CosineRouter(dim))`. In float32.
    """

    query: Float[Array, "dim dim"]
    key: Float[Array, "dim dim"]
    target_rate: float = eqx.field(static=True)

    def __init__(self, dim: int, *, target_rate: float = 0.2):
        """The target rate sizes buffers; it is an objective that holds it. Raises `ValueError` for one outside (0, 1)."""
        logit(target_rate)
        self.query, self.key, self.target_rate = jnp.eye(dim), jnp.eye(dim), target_rate

    @property
    def rate(self) -> float | None:
        return self.target_rate

    @property
    def initial_rate(self) -> float | None:
        """One half: neighbouring states of a fresh encoder are about as often alike as unlike."""
        return max(self.target_rate, 0.5)

    def __call__(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Boundaries:
        wide = hidden.astype(jnp.float32)
        probs = routing_probability(wide @ self.query.T, wide @ self.key.T, layout.starts)
        return self.drawn(probs, layout, draw)

    def prefill(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Routed:
        """The memory is the last row's hidden state."""
        last = jnp.maximum(jnp.sum(layout.mask, axis=1, dtype=jnp.int32) - 1, 0)
        return Routed(self(hidden, layout, draw), jnp.take_along_axis(hidden, last[:, None, None], axis=1, mode="clip"))

    def step(
        self, hidden: Float[Array, "batch 1 dim"], layout: Layout, draw: Draw, memory: Float[Array, "batch 1 dim"]
    ) -> Routed:
        both = jnp.concatenate([memory, hidden], axis=1).astype(jnp.float32)
        probs = routing_probability(both @ self.query.T, both @ self.key.T)[:, 1:]
        return Routed(self.drawn(jnp.where(layout.starts, 1.0, probs), layout, draw), hidden)

    def drawn(self, probs: Float[Array, "batch length"], layout: Layout, draw: Draw) -> Boundaries:
        """Boundaries with these probabilities."""
        actions = draw.bernoulli(probs, layout)
        # Where rows are equal or opposite the log-odds are infinite; bounded ones keep policy losses finite.
        inside = jnp.clip(probs, 1e-4, 1.0 - 1e-4)
        logits = jnp.log(inside) - jnp.log1p(-inside)
        return Boundaries(actions, logits, probs, layout.free, layout.starts)


class Likelier(AbstractRouter):
    """Another router's likelier action at each row (`probs > 0.5`), whatever the key: no chance is left."""

    router: AbstractRouter

    @property
    def rate(self) -> float | None:
        return self.router.rate

    @property
    def initial_rate(self) -> float | None:
        """One half, or more: fresh probabilities that are to become boundaries lie on both sides of one half."""
        return None if self.rate is None else max(self.rate, 0.5)

    def __call__(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Boundaries:
        return self.router(hidden, layout, dataclasses.replace(draw, key=None))

    def prefill(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Routed:
        return self.router.prefill(hidden, layout, dataclasses.replace(draw, key=None))

    def step(self, hidden: Float[Array, "batch 1 dim"], layout: Layout, draw: Draw, memory: PyTree[Array]) -> Routed:
        return self.router.step(hidden, layout, dataclasses.replace(draw, key=None), memory)


class AbstractTaught(AbstractRouter):
    """A router that in training takes boundaries that another draws, scored under its own policy, and draws its own otherwise.

    So a model is trained on other boundaries than it generates with, and evaluation judges it on both.
    """


class OffPolicy(AbstractTaught):
    """In training, boundaries that the `behaviour` draws, scored under the `policy`; in evaluation the policy's own.

    `ImportanceWeight` makes the score function unbiased again. The behaviour's rows must be independent given what its
    logits have seen, so that those logits are the probabilities of its draws: any `AbstractRouter` but the exact-count
    `UniformRouter`, whose place `Bernoulli` takes.
    """

    policy: AbstractRouter
    behaviour: AbstractRouter

    @property
    def rate(self) -> float | None:
        return self.policy.rate

    @property
    def initial_rate(self) -> float | None:
        return self.behaviour.initial_rate

    def __call__(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Boundaries:
        if not draw.training:
            return self.policy(hidden, layout, draw)
        drawn = self.behaviour(hidden, layout, draw)
        scored = self.policy(hidden, layout, dataclasses.replace(draw, actions=drawn.actions))
        log_prob = jax.lax.stop_gradient(action_log_prob(drawn.logits, drawn.actions))
        return dataclasses.replace(scored, behaviour_log_prob=log_prob)

    def prefill(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Routed:
        """Row by row there is no training: the boundaries are the policy's own."""
        return self.policy.prefill(hidden, layout, dataclasses.replace(draw, training=False))

    def step(self, hidden: Float[Array, "batch 1 dim"], layout: Layout, draw: Draw, memory: PyTree[Array]) -> Routed:
        return self.policy.step(hidden, layout, dataclasses.replace(draw, training=False), memory)


class Bernoulli(AbstractRowRouter):
    """A boundary at every byte with the same probability, independently of everything."""

    target_rate: float = eqx.field(static=True)

    def __check_init__(self):
        logit(self.target_rate)

    @property
    def rate(self) -> float | None:
        return self.target_rate

    def __call__(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Boundaries:
        probs = jnp.broadcast_to(draw.rate(self.target_rate), layout.mask.shape)
        actions = draw.bernoulli(probs, layout)
        return Boundaries(actions, jnp.log(probs) - jnp.log1p(-probs), probs, layout.free, layout.starts)


class Guided(AbstractTaught):
    """In training, boundaries that the `guide` draws, scored under the `student`; in evaluation the student's own.

    With `Imitation` as the objective the student becomes the guide, as far as it can, and generation needs no guide.
    """

    student: AbstractRouter
    guide: AbstractRouter

    @property
    def rate(self) -> float | None:
        return self.guide.rate

    @property
    def initial_rate(self) -> float | None:
        return self.guide.initial_rate

    def __call__(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Boundaries:
        if not draw.training:
            return self.student(hidden, layout, draw)
        drawn = self.guide(hidden, layout, draw)
        # Its rate is to be the guide's, whatever was asked for.
        return self.student(hidden, layout, dataclasses.replace(draw, actions=drawn.actions, target_rate=None))

    def prefill(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Routed:
        """Row by row there is no training: the boundaries are the student's own."""
        return self.student.prefill(hidden, layout, dataclasses.replace(draw, training=False))

    def step(self, hidden: Float[Array, "batch 1 dim"], layout: Layout, draw: Draw, memory: PyTree[Array]) -> Routed:
        return self.student.step(hidden, layout, dataclasses.replace(draw, training=False), memory)
