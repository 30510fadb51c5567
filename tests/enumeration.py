"""A small world in which every boundary string can be tried: exact expectations of any chain of reductions.

What a prediction is worth is a random number for each history of kept boundaries in its document, so that every dependence a
model could have is there and no model has to run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from estimators import (
    AbstractReduction,
    Bernoulli,
    Boundaries,
    Layout,
    ObjectiveInputs,
    OffPolicy,
    SamplingOptions,
    ScoreFunctionObjective,
    WindowedPolicy,
)
from estimators import equations as eq
from tests.conftest import text_bytes
from unet.likelihood import continues, plain_layout
from unet.ops import boundary_scan

DIM = 3
WINDOW = 2
BEHAVIOUR = 0.2


def policy(seed: int) -> WindowedPolicy:
    """A policy with memory and strong opinions."""
    router = WindowedPolicy(DIM, window=WINDOW, target_rate=BEHAVIOUR, scale=1.0)
    return eqx.tree_at(lambda r: r.weight, router, jax.random.normal(jax.random.key(seed), (1 + WINDOW, DIM)))


class World(eqx.Module):
    """All ways in which a batch of sequences can draw its boundaries.

    `signals` and `actions` (as drawn, before any were suppressed) are stacked over the `outcomes`; `scores` are the
    gradients of log π(a_i) in the policy's weights, `on` and `off` the probabilities of the outcomes under the policy and
    under the behaviour.
    """

    layout: Layout
    policy: WindowedPolicy
    signals: ObjectiveInputs
    actions: Bool[Array, "outcomes batch length"]
    scores: Float[Array, "outcomes batch length lags dim"]
    on: Float[Array, " outcomes"]
    off: Float[Array, " outcomes"]

    def gradients(
        self, reductions: Sequence[AbstractReduction], weighted: bool = True
    ) -> Float[Array, "outcomes length lags dim"]:
        """Of each outcome, the policy gradient at every row: that of a summed likelihood, to be climbed.

        `weighted` False takes the boundaries as the policy's own.
        """
        objective = ScoreFunctionObjective(tuple(reductions), BEHAVIOUR)

        def credited(inputs: ObjectiveInputs) -> Float[Array, "batch length"]:
            boundaries = inputs.boundaries
            if not weighted:
                boundaries = dataclasses.replace(boundaries, behaviour_log_prob=None)
            advantages = objective.advantages(dataclasses.replace(inputs, boundaries=boundaries))
            return jnp.where(boundaries.decided, advantages, 0.0)

        return jnp.einsum("obi,obitd->oitd", jax.vmap(credited)(self.signals), self.scores)

    def expected(self, reductions: Sequence[AbstractReduction]) -> Float[Array, "length lags dim"]:
        """The expected gradient where the behaviour draws."""
        return jnp.tensordot(self.off, self.gradients(reductions), 1)

    def expected_on_policy(self, reductions: Sequence[AbstractReduction]) -> Float[Array, "length lags dim"]:
        """The expected gradient where the policy itself draws and nothing is weighted."""
        return jnp.tensordot(self.on, self.gradients(reductions, weighted=False), 1)

    def exact(self, discount: float, batch_mean: bool = False) -> Float[Array, "length lags dim"]:
        """The gradient of the expected likelihood, by differentiating the sum over outcomes: no score function is in it.

        Every row has weights of its own; what row k earns counts γ^(k-i) times for those of row i. `batch_mean` scales row i
        by (n - 1)/n for its n valid sequences.
        """
        length, policy, hidden = self.layout.mask.shape[1], self.policy, self.signals.hidden[0]
        starts, free = self.layout.starts, self.layout.free
        times = 2.0 ** jnp.sum(~free[:, 1:])

        def expectation(copies: Float[Array, "length lags dim"]) -> Float[Array, "batch length"]:
            projections = jnp.einsum("itd,bid->bit", copies, hidden).at[..., 0].add(eq.logit(policy.target_rate))

            def outcome(actions, log_prob):
                logits = eq.soft_cap(eq.windowed_logits(projections, actions, starts), policy.cap)
                return jnp.exp(jnp.sum(eq.action_log_prob(logits, actions), where=free)) * log_prob / times

            return jnp.sum(jax.vmap(outcome)(self.actions, self.signals.log_prob), axis=0)

        copies = jnp.broadcast_to(policy.weight, (length, *policy.weight.shape))
        credit = jax.jit(jax.jacobian(expectation))(copies)  # batch, row of the likelihood, row of the policy, weights
        k, i = np.meshgrid(np.arange(length), np.arange(length), indexing="ij")
        powers = np.where(k >= i, float(discount) ** np.maximum(k - i, 0), 0.0)
        valid = np.asarray(self.signals.mask[0]).astype(float)
        count = valid.sum(0)
        share = (count - 1) / np.maximum(count, 1) if batch_mean else np.ones(length)
        return jnp.einsum("ki,bkitd->itd", jnp.asarray(powers * share, jnp.float32), credit)


def world(
    batch: int = 2,
    length: int = 5,
    *,
    behaviour: float | None = BEHAVIOUR,
    segments: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    capacity: int | None = None,
    samples: int = 1,
) -> World:
    """`batch` sequences of `length` bytes, each drawn `samples` times; `behaviour` None is another policy with memory."""
    rng = np.random.default_rng(0)
    layout = plain_layout(
        text_bytes(batch, length),
        None if segments is None else jnp.asarray(segments),
        None if mask is None else jnp.asarray(mask),
    )
    own_policy = policy(1)
    draws = OffPolicy(own_policy, policy(2) if behaviour is None else Bernoulli(behaviour))
    hidden = jnp.asarray(rng.normal(size=(batch, length, DIM)), jnp.float32)
    # Likelihoods of bytes in nats: far from 0, so that a baseline that is not subtracted rightly shows.
    worth, early = rng.normal(-5.0, 1.0, (batch, length, 2**length)), rng.normal(-5.0, 1.0, (batch, length))
    layout, hidden = jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=0), (layout, hidden))
    worth, early = np.repeat(worth, samples, axis=0), np.repeat(early, samples, axis=0)
    starts, free = np.asarray(layout.starts), np.asarray(layout.free)
    # Rows without a choice are tried both ways too, for worlds of one shape share their programs; each outcome is then there
    # several times over.
    rest = np.array(list(itertools.product([False, True], repeat=starts[:, 1:].size)))
    times = 2.0 ** np.sum(~free[:, 1:])
    actions = np.concatenate(
        [np.ones((len(rest), len(starts), 1), bool), rest.reshape(-1, *starts[:, 1:].shape)], axis=2
    )
    actions = (actions | starts) & np.asarray(layout.mask)

    def scored(weight: Float[Array, "lags dim"], taken: Bool[Array, "batch length"]) -> Boundaries:
        changed = eqx.tree_at(lambda p: p.weight, own_policy, weight)
        return dataclasses.replace(draws, policy=changed)(
            hidden, layout, SamplingOptions(boundary_scan, actions=taken, training=True)
        )

    def drawn(taken: Bool[Array, "batch length"]):
        full = scored(own_policy.weight, taken)
        own, theirs = eq.action_log_prob(full.logits, taken), full.behaviour_log_prob
        assert theirs is not None
        on, off = (jnp.exp(jnp.sum(log_probs, where=layout.free)) / times for log_probs in (own, theirs))
        scores = jax.jacobian(lambda w: eq.action_log_prob(scored(w, taken).logits, taken))(own_policy.weight)
        return full.truncated(length if capacity is None else capacity), scores, on, off

    limited, scores, on, off = jax.jit(jax.vmap(drawn))(jnp.asarray(actions))
    kept, code = np.asarray(limited.actions), np.zeros(actions.shape, int)
    for row in range(length):
        before = code[..., row - 1] if row else 0
        code[..., row] = np.where(starts[:, row], 0, 2 * before + kept[..., row])
    follows = np.asarray(continues(layout))
    log_prob = np.where(follows, worth[np.arange(len(worth))[:, None], np.arange(length), code], 0.0)

    early, follows = jnp.asarray(np.where(follows, early, 0.0), jnp.float32), jnp.asarray(follows)

    def seen(boundaries: Boundaries, log_prob: Float[Array, "batch length"]) -> ObjectiveInputs:
        return ObjectiveInputs(boundaries, hidden, log_prob, early, follows, follows, samples=samples)

    signals = jax.vmap(seen)(limited, jnp.asarray(log_prob, jnp.float32))

    return World(layout, own_policy, signals, jnp.asarray(actions), scores, on, off)
