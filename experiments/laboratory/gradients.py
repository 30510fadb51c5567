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

from estimators import AbstractReduction, Critic, Discount, EarlyExit, GeneralisedAdvantage, ImportanceWeight
from experiments.laboratory.greedy import at_a_point, neighbourhood
from experiments.laboratory.moments import (
    Moments,
    disarm_moments,
    exact_gradient,
    moments_of,
    pathwise,
    relaxed_moments,
    returns_by_string,
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
    """The score function with sets of variance reductions, on-policy and off-policy, and DisARM; each with its cost."""
    exit, far = EarlyExit(), Discount(0.99)
    critic = linear_critic(logits, tables, strings, returns_by_string((exit, far), logits, strings, tables))

    def moments(*reductions: AbstractReduction, centring: str = "none") -> Moments:
        returns = returns_by_string(reductions, logits, strings, tables, hidden=critic[..., None])
        return score_moments(logits, strings, returns, centring=centring)

    def several(samples: int) -> Moments:
        return sample_moments(logits, strings, returns_by_string((exit, far), logits, strings, tables), samples)

    def advantage(decay: float) -> Moments:
        step = eqx.tree_at(lambda g: g.critic, GeneralisedAdvantage(1, 0.99, decay), given_critic())
        return moments(exit, step)

    tried = [
        ("nothing", moments(), 1.0),
        ("early exit", moments(exit), 1.0),
        ("γ = .99", moments(far), 1.0),
        ("batch centring", moments(centring="batch"), 1.0),
        ("leave-one-out centring", moments(centring="leave-one-out"), 1.0),
        ("early exit, γ = .99", moments(exit, far), 1.0),
        ("γ = .99, batch centring", moments(far, centring="batch"), 1.0),
        ("early exit, batch centring", moments(exit, centring="batch"), 1.0),
        (PAPER, moments(exit, far, centring="batch"), 1.0),
        ("early exit, γ = .99, leave-one-out", moments(exit, far, centring="leave-one-out"), 1.0),
        *(
            (f"early exit, γ = .{tenths}, batch centring", moments(exit, Discount(tenths / 10), centring="batch"), 1.0)
            for tenths in (9, 8, 5)
        ),
        ("early exit, γ = .99, linear critic", moments(exit, far, given_critic()), 1.0),
        (
            "early exit, γ = .99, linear critic, batch centring",
            moments(exit, far, given_critic(), centring="batch"),
            1.0,
        ),
        ("early exit, γ = .99, λ = .8", advantage(0.8), 1.0),
        ("early exit, γ = .99, λ = .5", advantage(0.5), 1.0),
        ("early exit, γ = .99, 2 samples", several(2), 2.0),
        ("early exit, γ = .99, 4 samples", several(4), 4.0),
        *off_policy(logits, tables, strings),
    ]
    named = [(name if name == PAPER else f"score function: {name}", of, cost) for name, of, cost in tried]
    return [*named, ("DisARM", disarm_moments(logits, strings, tables), 2.0)]


def off_policy(logits: PerDecision, tables: Tables, strings: Strings) -> list[tuple[str, Moments, float]]:
    """Boundaries drawn at a fixed rate, their rewards weighted with every clip, without and with a baseline."""
    early = returns_by_string((EarlyExit(),), logits, strings, tables)
    critic = linear_critic(logits, tables, strings, early)[..., None]
    found = []
    for rate in (0.2, 0.5):
        behaviour = jnp.full_like(logits, jax.scipy.special.logit(rate))
        for clip in CLIPS:
            bound = "not clipped" if clip is None else f"clipped at {clip:g}"
            plain = EarlyExit(), ImportanceWeight(clip)
            for reductions, addition in ((plain, ""), ((*plain, given_critic()), ", linear critic")):
                returns = returns_by_string(reductions, logits, strings, tables, behaviour=behaviour, hidden=critic)
                moments = moments_of(score_of(logits, strings) * returns, behaviour, strings)
                found.append((f"early exit, drawn at rate {rate:g}, {bound}{addition}", moments, 1.0))
    return found


def given_critic() -> Critic:
    """A critic that expects what the states of width 1 say."""
    return eqx.tree_at(lambda critic: critic.weight, Critic(1), jnp.ones(1))


def straight_through(logits: PerDecision, tables: Tables, strings: Strings) -> list[tuple[str, Moments, float]]:
    """Straight-through estimators, and the score function for comparison."""
    return [
        *_on_policy(logits, tables, strings),
        ("straight-through Gumbel, τ = .5", relaxed_moments(logits, strings, tables, 0.5), 1.0),
        ("straight-through Gumbel, τ = 1", relaxed_moments(logits, strings, tables, 1.0), 1.0),
        ("straight-through Bernoulli", relaxed_moments(logits, strings, tables, None), 1.0),
    ]


def _chunking(subject: Subject, logits: PerDecision, strings: Strings) -> list[Finding]:
    """Dynamic chunking with drawn and with greedy boundaries, against the gradient of the loss of drawn ones."""
    weighted = tabulate(subject, logits)
    unweighted = tabulate(without_weights(subject), logits)
    exact = exact_gradient(logits, unweighted, strings)
    early = returns_by_string((EarlyExit(),), logits, strings, unweighted)
    whole = score_of(logits, strings) * early + pathwise(logits, unweighted)
    tried = [
        *_on_policy(logits, unweighted, strings),
        ("score function: early exit, with the gradient of smoothing", moments_of(whole, logits, strings), 1.0),
        ("dynamic chunking, drawn", moments_of(pathwise(logits, weighted), logits, strings), 1.0),
    ]
    return _found(
        [
            *(Tried(name, "smooth", DRAWN, of.mean, float(of.variance), exact, cost) for name, of, cost in tried),
            Tried("dynamic chunking, greedy", "smooth", DRAWN, at_a_point(subject, logits), None, exact, 1.0),
        ]
    )


def _greedy(subject: Subject, logits: PerDecision, key: PRNGKeyArray) -> list[Finding]:
    """Greedy dynamic chunking against gradients of the loss of greedy boundaries."""
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


def _on_policy(logits: PerDecision, tables: Tables, strings: Strings) -> list[tuple[str, Moments, float]]:
    """The paper's estimator and the unbiased one, for comparison."""
    early = returns_by_string((EarlyExit(),), logits, strings, tables)
    far = returns_by_string((EarlyExit(), Discount(0.99)), logits, strings, tables)
    return [
        (PAPER, score_moments(logits, strings, far, centring="batch"), 1.0),
        ("score function: early exit", score_moments(logits, strings, early), 1.0),
    ]


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
