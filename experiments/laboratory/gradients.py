"""The table of estimators: bias, variance and signal-to-noise against the exact gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from estimators import EarlyExit, ImportanceWeight
from experiments.laboratory.greedy import at_a_point, neighbourhood
from experiments.laboratory.moments import (
    Moments,
    credit,
    disarm_moments,
    exact_gradient,
    given_critic,
    moments_of,
    off_policy_returns,
    pathwise,
    relaxed_moments,
    sample_moments,
    score_moments,
    score_of,
    string_probs,
)
from experiments.laboratory.results import Finding
from experiments.laboratory.subjects import PerDecision, PerString, Strings, Subject, Tables, tabulate, with_chunker
from unet import Chunker, Select, Smooth


@dataclass(frozen=True)
class Subjects:
    """The same shape of model trained with each chunker."""

    distribute: Subject
    mean: Subject
    smooth: Subject


PAPER = "score function: early exit, γ = .99, batch centring (the paper)"
DRAWN = "drawn"
"""The expected loss of drawn boundaries, which all estimators but those with greedy actions are meant to descend."""
SCALES = (0.25, 1.0)
"""Scales of the neighbourhoods over which the loss of greedy boundaries is averaged."""
NEIGHBOURS = 256
CLIPS = (None, 5.0, 2.0, 1.0)
"""Bounds of importance weights."""


@dataclass(frozen=True)
class Tried:
    """An estimator's mean and variance (None, or 0, for one without noise), and the exact gradient of its objective."""

    name: str
    model: str
    objective: str
    mean: PerDecision
    variance: float | None
    exact: PerDecision
    cost: float


def findings(subjects: Subjects, logits: PerDecision, greedy_logits: PerDecision, key: PRNGKeyArray) -> list[Finding]:
    """Every estimator on the model of its own chunker, at `logits`; greedy boundaries at `greedy_logits` as well."""
    plain, pooled = tabulate(subjects.distribute, logits), tabulate(subjects.mean, logits)
    strings = subjects.distribute.strings

    def drawn(model: str, tables: Tables, estimators: list[tuple[str, Moments, float]]) -> list[Finding]:
        exact = exact_gradient(logits, tables, strings)
        tried = [
            Tried(name, model, DRAWN, moments.mean, float(moments.variance), exact, cost)
            for name, moments, cost in estimators
        ]
        return _found(tried)

    return [
        *drawn("distribute", plain, score_functions(logits, plain, strings)),
        *drawn("mean", pooled, straight_through(logits, pooled, strings)),
        *_chunking(subjects.smooth, logits, strings),
        *_greedy(subjects.smooth, greedy_logits, key),
    ]


def score_functions(logits: PerDecision, tables: Tables, strings: Strings) -> list[tuple[str, Moments, float]]:
    """The score function with every set of variance reductions worth a look, and its cost; DisARM; other behaviours."""
    raw = tables.log_prob
    early = raw - tables.early_log_prob[:, None]

    def moments(rewards: Array, discount: float, centring: str = "none", baseline: Array | None = None) -> Moments:
        return score_moments(logits, strings, credit(rewards, discount), centring=centring, baseline=baseline)

    far = credit(early, 0.99)
    critic = linear_critic(logits, tables, strings, far)
    tried = [
        ("nothing", moments(raw, 1.0), 1.0),
        ("early exit", moments(early, 1.0), 1.0),
        ("γ = .99", moments(raw, 0.99), 1.0),
        ("batch centring", moments(raw, 1.0, "batch"), 1.0),
        ("leave-one-out centring", moments(raw, 1.0, "leave-one-out"), 1.0),
        ("early exit, γ = .99", moments(early, 0.99), 1.0),
        ("γ = .99, batch centring", moments(raw, 0.99, "batch"), 1.0),
        ("early exit, batch centring", moments(early, 1.0, "batch"), 1.0),
        (PAPER, moments(early, 0.99, "batch"), 1.0),
        ("early exit, γ = .99, leave-one-out", moments(early, 0.99, "leave-one-out"), 1.0),
        ("early exit, γ = .9, batch centring", moments(early, 0.9, "batch"), 1.0),
        ("early exit, γ = .8, batch centring", moments(early, 0.8, "batch"), 1.0),
        ("early exit, γ = .5, batch centring", moments(early, 0.5, "batch"), 1.0),
        ("early exit, γ = .99, linear critic", moments(early, 0.99, baseline=critic), 1.0),
        ("early exit, γ = .99, linear critic, batch centring", moments(early, 0.99, "batch", critic), 1.0),
        ("early exit, γ = .99, λ = .8", advantages(logits, tables, strings, critic, 0.8), 1.0),
        ("early exit, γ = .99, λ = .5", advantages(logits, tables, strings, critic, 0.5), 1.0),
        ("early exit, γ = .99, 2 samples", sample_moments(logits, strings, far, 2), 2.0),
        ("early exit, γ = .99, 4 samples", sample_moments(logits, strings, far, 4), 4.0),
        *off_policy(logits, tables, strings, linear_critic(logits, tables, strings, credit(early, 1.0))),
    ]
    named = [(name if name == PAPER else f"score function: {name}", of, cost) for name, of, cost in tried]
    return [*named, ("DisARM", disarm_moments(logits, strings, tables), 2.0)]


def off_policy(
    logits: PerDecision, tables: Tables, strings: Strings, critic: PerDecision
) -> list[tuple[str, Moments, float]]:
    """Boundaries drawn at a fixed rate, their rewards weighted with every clip, without and with a baseline."""
    found = []
    for rate in (0.2, 0.5):
        behaviour = jnp.full_like(logits, jax.scipy.special.logit(rate))
        for clip in CLIPS:
            bound = "not clipped" if clip is None else f"clipped at {clip:g}"
            plain = EarlyExit(), ImportanceWeight(clip)
            for reductions, addition in ((plain, ""), ((*plain, given_critic()), ", linear critic")):
                returns = off_policy_returns(reductions, logits, behaviour, strings, tables, critic)
                moments = moments_of(score_of(logits, strings) * returns, behaviour, strings)
                found.append((f"early exit, drawn at rate {rate:g}, {bound}{addition}", moments, 1.0))
    return found


def straight_through(logits: PerDecision, tables: Tables, strings: Strings) -> list[tuple[str, Moments, float]]:
    """Estimators through the derivative with respect to the actions, and the score function beside them."""
    return [
        (PAPER, _paper(logits, tables, strings), 1.0),
        ("score function: early exit", _early(logits, tables, strings), 1.0),
        ("straight-through Gumbel, τ = .5", relaxed_moments(logits, strings, tables, 0.5), 1.0),
        ("straight-through Gumbel, τ = 1", relaxed_moments(logits, strings, tables, 1.0), 1.0),
        ("straight-through Bernoulli", relaxed_moments(logits, strings, tables, None), 1.0),
    ]


def _chunking(subject: Subject, logits: PerDecision, strings: Strings) -> list[Finding]:
    """Dynamic chunking against the loss of drawn boundaries, whatever boundaries it takes itself."""
    weighted = tabulate(subject, logits)
    unweighted = tabulate(without_weights(subject), logits)
    exact = exact_gradient(logits, unweighted, strings)
    early = credit(unweighted.log_prob - unweighted.early_log_prob[:, None], 1.0)
    whole = score_of(logits, strings) * early + pathwise(logits, unweighted)
    tried = [
        (PAPER, _paper(logits, unweighted, strings)),
        ("score function: early exit", _early(logits, unweighted, strings)),
        ("score function: early exit, with the gradient of smoothing", moments_of(whole, logits, strings)),
        ("dynamic chunking, drawn", moments_of(pathwise(logits, weighted), logits, strings)),
    ]
    return _found(
        [
            *(Tried(name, "smooth", DRAWN, of.mean, float(of.variance), exact, 1.0) for name, of in tried),
            Tried("dynamic chunking, greedy", "smooth", DRAWN, at_a_point(subject, logits), None, exact, 1.0),
        ]
    )


def _greedy(subject: Subject, logits: PerDecision, key: PRNGKeyArray) -> list[Finding]:
    """Greedy dynamic chunking against the loss that it is paid for, that of greedy boundaries."""
    unweighted, name = without_weights(subject), "dynamic chunking, greedy"
    here = at_a_point(subject, logits)
    tried = [Tried(name, "smooth", "greedy, boundaries fixed", here, None, at_a_point(unweighted, logits), 1.0)]
    for scale in SCALES:
        around = neighbourhood(subject, unweighted, logits, key, scale=jnp.asarray(scale), samples=NEIGHBOURS)
        tried.append(
            Tried(name, "smooth", f"greedy, s = {scale:g}", around.estimator, None, around.gradient, 1.0),
        )
    return _found(tried)


def without_weights(subject: Subject) -> Subject:
    """The same model without straight-through weights, whose gradient is no derivative of anything."""
    return with_chunker(subject, Chunker(Select(), Smooth(weighting="none")))


@eqx.filter_jit
def linear_critic(logits: PerDecision, tables: Tables, strings: Strings, returns: PerString) -> PerDecision:
    """What a linear critic on the encoder's states expects of the returns: for each text the ridge regression on the means
    of the other texts, so that it is never asked about what it was fitted to."""
    mean = jnp.einsum("ts,tsd->td", string_probs(logits, strings), returns)
    features = jnp.concatenate([tables.hidden, jnp.ones((*mean.shape, 1))], axis=2)
    dim = features.shape[2]

    def one(number: Int[Array, ""]) -> Float[Array, " decisions"]:
        others = jnp.where(jnp.arange(len(mean)) == number, 0.0, 1.0)
        ridge = 0.1 * (len(mean) - 1) * mean.shape[1] * jnp.eye(dim)
        square = jnp.einsum("t,tdf,tdg->fg", others, features, features)
        weights = jnp.linalg.solve(square + ridge, jnp.einsum("t,tdf,td->f", others, features, mean))
        return features[number] @ weights

    return jax.lax.map(one, jnp.arange(len(mean)))


def advantages(
    logits: PerDecision, tables: Tables, strings: Array, critic: PerDecision, decay: float, discount: float = 0.99
) -> Moments:
    """Generalised advantages with this critic. Row d of `critic` is the value of the state at row d + 1, whose reward is
    that of the prediction made there; the last state has none."""
    rewards = (tables.log_prob - tables.early_log_prob[:, None])[:, :, 1:]
    values = critic[:, None, :-1]
    after = jnp.pad(values[:, :, 1:], ((0, 0), (0, 0), (0, 1)))
    errors = jnp.pad(rewards + discount * after - values, ((0, 0), (0, 0), (1, 0)))
    return score_moments(logits, strings, credit(errors, discount * decay))


def _early(logits: PerDecision, tables: Tables, strings: Strings) -> Moments:
    early = tables.log_prob - tables.early_log_prob[:, None]
    return score_moments(logits, strings, credit(early, 1.0))


def _paper(logits: PerDecision, tables: Tables, strings: Strings) -> Moments:
    early = tables.log_prob - tables.early_log_prob[:, None]
    return score_moments(logits, strings, credit(early, 0.99), centring="batch")


def _found(tried: Sequence[Tried]) -> list[Finding]:
    """Findings on one model, relative to the paper's estimator where it is among them."""
    found = []
    paper_variance = paper_snr = math.nan
    for one in sorted(tried, key=lambda one: one.name != PAPER):
        mean, exact = np.asarray(one.mean, np.float64).reshape(-1), np.asarray(one.exact, np.float64).reshape(-1)
        size, exact_size, product = float(np.linalg.norm(mean)), float(np.linalg.norm(exact)), float(mean @ exact)
        cosine = product / (size * exact_size) if size and exact_size else math.nan
        variance = one.variance or math.nan
        snr = size**2 / variance
        along = snr * cosine * abs(cosine)
        if one.name == PAPER:
            paper_variance, paper_snr = variance, along
        found.append(
            Finding(
                one.name,
                one.model,
                one.objective,
                bias=float(np.linalg.norm(mean - exact)) / exact_size if exact_size else math.nan,
                scale=product / exact_size**2 if exact_size else math.nan,
                cosine=cosine,
                variance=variance / paper_variance,
                snr=snr,
                gain=along / one.cost / paper_snr,
                cost=one.cost,
            )
        )
    return found
