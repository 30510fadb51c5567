r"""The gradient that training gives a router, and the one it should give it: for any estimator in a `UNet`.

On short texts every boundary string can be tried. The shipped router, chunker and objective are run on all of them and
differentiated, so nothing here knows how an estimator works.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree

from estimators import AbstractRouter, Layout, SamplingOptions
from estimators.base import Routed, trainable
from estimators.equations import action_log_prob
from unet import UNet
from unet.hierarchy import Hierarchy, repeated
from unet.likelihood import plain_layout
from unet.losses import Prediction, Reward, byte_rewards, objective_inputs

Draws = Literal["enumerated", "fixed", "sampled"]
Strings = Bool[Array, "strings length"]
"""All boundary strings of a length: the first action is forced, the others take all values."""
OUTCOMES = 2**14
"""The largest number of outcomes of one training step that are summed."""
BLOCK = 64
"""Outcomes whose gradients are computed at once, so that one compiled program serves any number of them."""
STEP = 0.03
"""Distance in logits over which likelihoods are differentiated numerically."""


@dataclass(frozen=True)
class GradientReport:
    r"""The gradient of one training step with respect to the router's parameters, in nats per byte; the language model is held.

    `exact`: $\nabla E_{a \sim \pi}[L(a)]$, L the language-model loss (mean over predicted bytes and texts), π the router's
    probabilities. `expected`: the mean gradient of the training loss. `regulariser`: the part of it that remains where no
    action changes a likelihood, such as that of a rate loss; `task` is the rest, which should be a positive multiple of
    `exact`. `variance`: the trace of the covariance of the training gradient. `rate`: boundaries per byte in training.

    `draws` says how the mean was taken. *enumerated*: all outcomes were summed with their probabilities. *fixed*: training
    draws no boundaries, there is one outcome. *sampled*: over random draws, since the gradient depends on more than the
    actions, or since they are not drawn with the probabilities that the router reports. `error` is then the standard error of
    `task` (the length of the vector), otherwise 0.
    """

    exact: Float[np.ndarray, " parameters"]
    expected: Float[np.ndarray, " parameters"]
    regulariser: Float[np.ndarray, " parameters"]
    variance: float
    rate: float
    draws: Draws
    error: float = 0.0

    @property
    def parameters(self) -> int:
        """How many parameters of the router are trained."""
        return len(self.exact)

    @property
    def task(self) -> Float[np.ndarray, " parameters"]:
        """The part of the expected gradient that depends on likelihoods."""
        return self.expected - self.regulariser

    @property
    def scale(self) -> float:
        """The number c that makes c·exact nearest to `task`; weights of losses are a part of it. NaN without a gradient."""
        return float(self.task @ self.exact) / size**2 if (size := _length(self.exact)) else math.nan

    @property
    def signal(self) -> float:
        """The squared length of `task`, without what sampling adds to it."""
        return max(_length(self.task) ** 2 - self.error**2, 0.0)

    @property
    def cosine(self) -> float:
        """Between `task` and `exact`. NaN if one of them is 0."""
        return self.scale * _length(self.exact) / math.sqrt(self.signal) if self.signal else math.nan

    @property
    def bias(self) -> float:
        """The share of `task` that `exact` does not explain, |task - scale·exact| / |task|: 0 for an estimator that is
        unbiased up to its scale, 1 for one without relation to the gradient. NaN where the cosine is."""
        rest = _length(self.task - self.scale * self.exact) ** 2 - self.error**2
        return math.sqrt(max(rest, 0.0) / self.signal) if self.signal else math.nan

    @property
    def snr(self) -> float:
        """|task|² / variance; NaN without noise."""
        return self.signal / self.variance if self.variance else math.nan


def measure(
    model: UNet, texts: Int[Array, "texts length"], key: PRNGKeyArray, *, samples: int = 1, draws: int = 2**14
) -> GradientReport:
    """The gradient of a training step whose batch is `texts`, each with `samples` sets of boundaries.

    `draws` random draws establish how training draws, and are averaged over where enumeration is impossible. The early-exit
    head predicts at all positions. Raises `ValueError` for a model without exactly one level of tokens, and where the texts
    have more than `OUTCOMES` outcomes.
    """
    if not isinstance(model.stage, Hierarchy) or len(model.stage.estimators) != 1:
        raise ValueError(f"one level of tokens can be measured; the model has {len(model.stage.estimators)}")
    texts = jnp.asarray(texts, jnp.int32)
    rows, decisions = len(texts) * samples, texts.shape[1] - 1
    keys = jax.random.split(key, draws)
    drawn = np.asarray(_drawn(model, texts, keys, samples))
    rate = float(np.mean(drawn))
    if not trains_router(model):
        none = np.zeros(0)
        return GradientReport(none, none, none, 0.0, rate, "fixed" if _all_alike(drawn) else "sampled")
    if rows * decisions > math.log2(OUTCOMES):
        raise ValueError(
            f"{rows} sequences of {decisions} decisions have 2^{rows * decisions} outcomes, and at most {OUTCOMES} are summed: "
            "measure fewer or shorter texts"
        )
    strings, some = all_strings(decisions), np.arange(BLOCK) % draws
    first = jnp.asarray(drawn[some])
    exact, probs = (np.asarray(part, np.float64) for part in _exact(model, texts, strings))
    probs = np.repeat(probs, samples, axis=0)
    again = np.asarray(_gradients(model, texts, first, samples))
    by_key = _gradients(model, texts, keys[some], samples)
    follows_actions = np.allclose(again, by_key, rtol=1e-3, atol=1e-4 * np.max(np.abs(again)))
    kind: Draws = "sampled"
    outcomes, weights = keys, np.full(draws, 1 / draws)
    if follows_actions and _all_alike(drawn):
        kind, outcomes, weights = "fixed", first[:1], np.ones(1)
    elif follows_actions and _drawn_with(probs, drawn):
        places = np.array(list(itertools.product(range(len(strings)), repeat=rows)))
        kind, outcomes, weights = "enumerated", strings[places], np.prod(probs[np.arange(rows), places], axis=1)
        rate = float(np.mean(probs @ np.mean(strings, axis=1)))
    (expected, regulariser), (total, own) = _moments(model, texts, samples, outcomes, weights)
    unbiased = draws / (draws - 1) if kind == "sampled" else 1.0
    error = math.sqrt(own / (draws - 1)) if kind == "sampled" else 0.0
    return GradientReport(exact, expected, regulariser, unbiased * total, rate, kind, error)


def all_strings(decisions: int) -> Strings:
    """Every string of so many decisions after a forced boundary, in the order of binary numbers."""
    rest = np.array(list(itertools.product([False, True], repeat=decisions)))
    return jnp.asarray(np.concatenate([np.ones((len(rest), 1), bool), rest], axis=1))


def _moments(
    model: UNet,
    texts: Int[Array, "texts length"],
    samples: int,
    outcomes: Bool[Array, "outcomes batch length"] | Key[Array, " outcomes"],
    weights: Float[np.ndarray, " outcomes"],
) -> tuple[Float[np.ndarray, "2 parameters"], Float[np.ndarray, 2]]:
    """The means of the two gradients, and the variances of the first and of their difference."""
    mean, squares = np.zeros(()), np.zeros(2)
    for start in range(0, len(weights), BLOCK):
        # The last block is filled up with outcomes of weight 0.
        share = np.pad(weights[start : start + BLOCK], (0, max(start + BLOCK - len(weights), 0)))
        block = outcomes[np.arange(start, start + BLOCK) % len(weights)]
        found = np.asarray(_gradients(model, texts, block, samples), np.float64)
        mean = mean + np.tensordot(share, found, 1)
        own = found[:, 0] - found[:, 1]
        squares += share @ np.stack([np.sum(part**2, axis=1) for part in (found[:, 0], own)], axis=1)
    means = np.array([np.sum(mean[0] ** 2), np.sum((mean[0] - mean[1]) ** 2)])
    # Differences of rounding are no variance.
    return mean, np.where(squares - means > 1e-10 * means, squares - means, 0.0)


def _all_alike(drawn: Bool[np.ndarray, "draws batch length"]) -> bool:
    return bool(np.all(drawn == drawn[:1]))


def _drawn_with(probs: Float[np.ndarray, "batch strings"], drawn: Bool[np.ndarray, "draws batch length"]) -> bool:
    r"""Whether the sequences could have been drawn with these probabilities, and independently of each other.

    The frequencies f of n draws have $P(\lVert f - p\rVert_2 > (1 + \sqrt{2 \ln(1/\delta)}) / \sqrt n) < \delta$ (McDiarmid's
    inequality), here with δ = 1e-6, for the strings of each sequence and for the outcomes of the batch.
    """
    count, strings = len(drawn), probs.shape[1]
    places = drawn[:, :, 1:] @ (2 ** np.arange(drawn.shape[2] - 1)[::-1])
    outcome, joint = np.zeros(count, int), np.ones(1)
    for place, own in zip(places.T, probs, strict=True):
        outcome, joint = strings * outcome + place, np.outer(joint, own).ravel()
    bound = (1 + math.sqrt(2 * math.log(1e6))) / math.sqrt(count)
    return all(
        np.linalg.norm(np.bincount(found, minlength=len(stated)) / count - stated) <= bound
        for found, stated in [*zip(places.T, probs, strict=True), (outcome, joint)]
    )


def _length(vector: np.ndarray) -> float:
    return float(np.linalg.norm(vector))


def with_router(model: UNet, router: AbstractRouter) -> UNet:
    """The model with another router."""
    return eqx.tree_at(lambda m: m.stage.estimator.router, model, router)


def _trained(model: UNet) -> tuple[PyTree[Array], PyTree[Array]]:
    """The router's parameters that training changes, and the rest of it."""
    router = model.stage.estimators[0].router
    return eqx.partition(router, trainable(router))


def trains_router(model: UNet) -> bool:
    """Whether the router has parameters that training changes."""
    return bool(jax.tree.leaves(_trained(model)[0]))


class _Parameters(eqx.Module):
    """A model as a function of one vector, the trained parameters of its router."""

    model: UNet

    @property
    def vector(self) -> Float[Array, " parameters"]:
        return ravel_pytree(_trained(self.model)[0])[0]

    def at(self, vector: Float[Array, " parameters"]) -> UNet:
        trained, rest = _trained(self.model)
        return with_router(self.model, eqx.combine(ravel_pytree(trained)[1](vector), rest))


def _losses(model: UNet, prediction: Prediction, layout: Layout, samples: int) -> Float[Array, 2]:
    """The training loss, and the objective's own where all rewards are 0."""
    reward = byte_rewards(prediction, layout)
    zeros, early = jnp.zeros_like(reward.log_prob), reward.early_log_prob
    nothing = Reward(zeros, None if early is None else zeros, reward.scored)
    objective = model.stage.estimators[0].objective
    inputs = objective_inputs(nothing, prediction.levels, [objective], target_rate=None, samples=samples)
    return jnp.stack([model.losses(prediction, layout, samples=samples).loss, objective(inputs[0]).loss])


@eqx.filter_jit
def _gradients(
    model: UNet,
    texts: Int[Array, "texts length"],
    outcomes: Bool[Array, "outcomes batch length"] | Key[Array, " outcomes"],
    samples: int,
) -> Float[Array, "outcomes 2 parameters"]:
    """The gradients of the two `_losses`, for boundaries that are given or drawn with keys."""
    layout, parameters = repeated(plain_layout(texts), samples), _Parameters(model)
    drawn = jnp.issubdtype(outcomes.dtype, jax.dtypes.prng_key)

    def losses(vector: Float[Array, " parameters"], outcome: Bool[Array, "batch length"] | PRNGKeyArray):
        changed = parameters.at(vector)
        if drawn:
            prediction = changed(texts, key=outcome, samples=samples, training=True)
        else:
            prediction = changed(layout.bytes, actions=(outcome,), training=True)
        return _losses(changed, prediction, layout, samples)

    return jax.vmap(jax.jacrev(losses), (None, 0))(parameters.vector, outcomes)


@eqx.filter_jit
def _drawn(
    model: UNet, texts: Int[Array, "texts length"], keys: Key[Array, " draws"], samples: int
) -> Bool[Array, "draws batch length"]:
    """The boundaries that training draws with these keys."""

    def one(key: PRNGKeyArray) -> Bool[Array, "batch length"]:
        return model(texts, key=key, samples=samples, training=True).levels[0].drawn

    return jax.lax.map(one, keys, batch_size=64)


class _Moved(AbstractRouter):
    """A router whose logits and probabilities are moved, each by a number of logits at each position."""

    router: AbstractRouter
    logits: Float[Array, "batch length"]
    probs: Float[Array, "batch length"]

    @property
    def rate(self) -> float | None:
        return self.router.rate

    def init_state(self, batch: int) -> PyTree[Array]:
        return self.router.init_state(batch)

    def route(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        options: SamplingOptions,
        state: PyTree[Array] = None,
    ) -> Routed:
        routed = self.router.route(hidden, layout, options, state)
        found = routed.boundaries
        odds = jax.scipy.special.logit(jnp.clip(found.probs, 1e-6, 1 - 1e-6))
        probs = jnp.where(self.probs == 0.0, found.probs, jax.nn.sigmoid(odds + self.probs))
        moved = eqx.tree_at(lambda b: (b.logits, b.probs), found, (found.logits + self.logits, probs))
        return Routed(moved, routed.update)


@eqx.filter_jit
def _exact(
    model: UNet, texts: Int[Array, "texts length"], strings: Strings
) -> tuple[Float[Array, " parameters"], Float[Array, "texts strings"]]:
    r"""The gradient of the expected loss, and the probability with which training should draw each string.

    $\nabla \sum_a \pi(a) L(a) = \sum_a [L(a) \nabla\pi(a) + \pi(a) \nabla L(a)]$, π through the shipped router. L depends on the
    router by way of the logits and probabilities that a chunker reads. Straight-through gradients are no derivatives of it, so
    its derivative with respect to these is taken from its values, by five-point differences.
    """
    parameters, router = _Parameters(model), model.stage.estimators[0].router
    decisions = strings.shape[1] - 1
    # First no shift, then each logit and each probability by two steps and one, down and up.
    stencil = STEP * jnp.array([-2.0, -1.0, 1.0, 2.0])
    shifts = jnp.pad(jnp.kron(jnp.eye(2 * decisions), stencil[:, None]), ((1, 0), (0, 0)))

    def loss(text: Int[Array, " length"], shift: Float[Array, "2 decisions"]) -> Float[Array, " strings"]:
        bytes = jnp.broadcast_to(text, strings.shape)
        logits, probs = (jnp.broadcast_to(jnp.pad(row, (1, 0)), strings.shape) for row in shift)
        moved = with_router(model, _Moved(router, logits, probs))
        prediction = moved(bytes, actions=(strings,), training=True)
        return -jnp.sum(byte_rewards(prediction, plain_layout(bytes)).log_prob, axis=1) / decisions

    def values(text: Int[Array, " length"]) -> tuple[Float[Array, " strings"], Float[Array, "both strings"]]:
        """The loss of each string, and its derivatives."""
        found = jax.lax.map(lambda shift: loss(text, shift.reshape(2, decisions)), shifts, batch_size=16)
        low, below, above, high = jnp.moveaxis(found[1:].reshape(2 * decisions, 4, -1), 1, 0)
        return found[0], (8 * (above - below) - (high - low)) / (12 * STEP)

    def expected(vector: Float[Array, " parameters"], text: Int[Array, " length"]):
        bytes = jnp.broadcast_to(text, strings.shape)
        boundaries = parameters.at(vector)(bytes, actions=(strings,), training=True).levels[0].boundaries
        free = plain_layout(bytes).free
        own = jnp.exp(jnp.sum(action_log_prob(boundaries.logits, strings), where=free, axis=1))
        drawn_by = boundaries.behaviour_log_prob
        training = own if drawn_by is None else jnp.exp(jnp.sum(drawn_by, where=free, axis=1))
        logits, probs = boundaries.logits[:, 1:], boundaries.probs[:, 1:]
        inside = jax.lax.stop_gradient(jnp.clip(probs, 1e-6, 1 - 1e-6))
        read = jnp.concatenate([logits, probs / (inside * (1.0 - inside))], axis=1)
        losses, slopes = values(text)
        value = own @ losses + jax.lax.stop_gradient(own) @ jnp.sum(slopes.T * read, axis=1)
        return value, training

    def one(text: Int[Array, " length"]) -> tuple[Float[Array, " parameters"], Float[Array, " strings"]]:
        return jax.grad(expected, has_aux=True)(parameters.vector, text)

    gradients, probs = jax.lax.map(one, texts)
    return jnp.mean(gradients, axis=0), probs
