"""The table of estimators: bias, variance and signal-to-noise against the exact gradient."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.laboratory.moments import (
    Moments,
    credit,
    disarm_moments,
    exact_gradient,
    off_policy_moments,
    pathwise_moments,
    relaxed_moments,
    sample_moments,
    score_moments,
    score_of,
    string_probs,
)
from experiments.laboratory.results import Finding
from experiments.laboratory.subjects import Subject, Tables, tabulate, with_chunker
from unet import SelectSmooth


@dataclass(frozen=True)
class Subjects:
    """The same shape of model trained with each chunker."""

    distribute: Subject
    mean: Subject
    smooth: Subject


PAPER = "score function: early exit, γ = .99, batch centring (the paper)"


def findings(subjects: Subjects, logits: Float[Array, "texts decisions"]) -> list[Finding]:
    """Every estimator at `logits`, each on the model of its own chunker."""
    plain = tabulate(subjects.distribute, logits)
    pooled = tabulate(subjects.mean, logits)
    weighted = tabulate(subjects.smooth, logits)
    unweighted = tabulate(with_chunker(subjects.smooth, SelectSmooth(weighting="none")), logits)
    strings = subjects.distribute.strings
    exact = {
        "distribute": exact_gradient(logits, plain, strings),
        "mean": exact_gradient(logits, pooled, strings),
        "smooth": exact_gradient(logits, unweighted, strings),
    }
    tried: list[tuple[str, str, Moments, float]] = [
        (name, "distribute", moments, cost) for name, moments, cost in score_functions(logits, plain, subjects)
    ]
    tried += [
        ("DisARM", "distribute", disarm_moments(logits, strings, plain), 2.0),
        ("straight-through Gumbel, τ = .5", "mean", relaxed_moments(logits, strings, pooled, 0.5), 1.0),
        ("straight-through Gumbel, τ = 1", "mean", relaxed_moments(logits, strings, pooled, 1.0), 1.0),
        ("straight-through Bernoulli", "mean", relaxed_moments(logits, strings, pooled, None), 1.0),
        ("score function: early exit", "mean", _early(logits, pooled, subjects.mean), 1.0),
        ("dynamic chunking, likelier actions", "smooth", pathwise_moments(logits, strings, weighted, True), 1.0),
        ("dynamic chunking, drawn actions", "smooth", pathwise_moments(logits, strings, weighted, False), 1.0),
        (
            "score function: early exit, with the gradient of smoothing",
            "smooth",
            _with_pathwise(logits, unweighted, subjects.smooth),
            1.0,
        ),
    ]
    paper = next(float(moments.variance) for name, _, moments, _ in tried if name == PAPER)
    return [_finding(name, model, moments, exact[model], cost, paper) for name, model, moments, cost in tried]


def score_functions(
    logits: Float[Array, "texts decisions"], tables: Tables, subjects: Subjects
) -> list[tuple[str, Moments, float]]:
    """The score function with every set of variance reductions worth a look, and its cost."""
    strings = subjects.distribute.strings
    raw = tables.log_lik
    early = raw - tables.early_log_lik[:, None]

    def moments(rewards: Array, discount: float, centring: str = "none", baseline: Array | None = None) -> Moments:
        return score_moments(logits, strings, credit(rewards, discount), centring=centring, baseline=baseline)

    critic = linear_critic(logits, tables, strings, credit(early, 0.99))
    half = jnp.zeros_like(logits)
    uniform = jnp.full_like(logits, jax.scipy.special.logit(0.2))
    return [
        ("score function: nothing", moments(raw, 1.0), 1.0),
        ("score function: early exit", moments(early, 1.0), 1.0),
        ("score function: γ = .99", moments(raw, 0.99), 1.0),
        ("score function: batch centring", moments(raw, 1.0, "batch"), 1.0),
        ("score function: leave-one-out centring", moments(raw, 1.0, "leave-one-out"), 1.0),
        ("score function: early exit, γ = .99", moments(early, 0.99), 1.0),
        ("score function: γ = .99, batch centring", moments(raw, 0.99, "batch"), 1.0),
        ("score function: early exit, batch centring", moments(early, 1.0, "batch"), 1.0),
        (PAPER, moments(early, 0.99, "batch"), 1.0),
        ("score function: early exit, γ = .99, leave-one-out", moments(early, 0.99, "leave-one-out"), 1.0),
        ("score function: early exit, γ = .9, batch centring", moments(early, 0.9, "batch"), 1.0),
        ("score function: early exit, γ = .8, batch centring", moments(early, 0.8, "batch"), 1.0),
        ("score function: early exit, γ = .5, batch centring", moments(early, 0.5, "batch"), 1.0),
        ("score function: early exit, γ = .99, linear critic", moments(early, 0.99, baseline=critic), 1.0),
        (
            "score function: early exit, γ = .99, linear critic, batch centring",
            moments(early, 0.99, "batch", critic),
            1.0,
        ),
        ("score function: early exit, γ = .99, λ = .8", advantages(logits, tables, strings, critic, 0.8), 1.0),
        ("score function: early exit, γ = .99, λ = .5", advantages(logits, tables, strings, critic, 0.5), 1.0),
        (
            "score function: early exit, γ = .99, 2 samples",
            sample_moments(logits, strings, credit(early, 0.99), 2),
            2.0,
        ),
        (
            "score function: early exit, γ = .99, 4 samples",
            sample_moments(logits, strings, credit(early, 0.99), 4),
            4.0,
        ),
        (
            "score function: early exit, off-policy at rate .2",
            off_policy_moments(logits, uniform, strings, early, 1.0),
            1.0,
        ),
        (
            "score function: early exit, off-policy at rate .5",
            off_policy_moments(logits, half, strings, early, 1.0),
            1.0,
        ),
    ]


def linear_critic(
    logits: Float[Array, "texts decisions"],
    tables: Tables,
    strings: Array,
    returns: Float[Array, "texts strings decisions"],
) -> Float[Array, "texts decisions"]:
    """What the best linear critic on the encoder's states expects of the returns, by ridge regression on their means."""
    mean = jnp.einsum("ts,tsd->td", string_probs(logits, strings), returns).reshape(-1)
    states = tables.hidden.reshape(-1, tables.hidden.shape[-1])
    features = jnp.concatenate([states, jnp.ones((len(states), 1))], axis=1)
    # Fewer states than dimensions would let the critic know every mean by heart, as no critic of unseen text can.
    ridge = 0.1 * len(states) * jnp.eye(features.shape[1])
    weights = jnp.linalg.solve(features.T @ features + ridge, features.T @ mean)
    return (features @ weights).reshape(logits.shape)


def advantages(
    logits: Float[Array, "texts decisions"],
    tables: Tables,
    strings: Array,
    critic: Float[Array, "texts decisions"],
    decay: float,
    discount: float = 0.99,
) -> Moments:
    """Generalised advantages with this critic. Row d of `critic` is the value of the state at row d + 1, whose reward is
    that of the prediction made there; the last state has none."""
    rewards = (tables.log_lik - tables.early_log_lik[:, None])[:, :, 1:]
    values = critic[:, None, :-1]
    after = jnp.pad(values[:, :, 1:], ((0, 0), (0, 0), (0, 1)))
    errors = jnp.pad(rewards + discount * after - values, ((0, 0), (0, 0), (1, 0)))
    return score_moments(logits, strings, credit(errors, discount * decay))


def _early(logits: Array, tables: Tables, subject: Subject) -> Moments:
    early = tables.log_lik - tables.early_log_lik[:, None]
    return score_moments(logits, subject.strings, credit(early, 1.0))


def _with_pathwise(logits: Array, tables: Tables, subject: Subject) -> Moments:
    """The score function plus the derivative through the probabilities that smoothing reads: the whole derivative."""
    strings = subject.strings
    prob = string_probs(logits, strings)
    probs = jax.nn.sigmoid(logits)[:, None]
    returns = credit(tables.log_lik - tables.early_log_lik[:, None], 1.0)
    sample = score_of(logits, strings) * returns + tables.by_probs * probs * (1.0 - probs)
    mean = jnp.einsum("ts,tsd->td", prob, sample)
    second = jnp.einsum("ts,tsd,tse->tde", prob, sample, sample)
    decisions = logits.shape[1]
    return Moments(-mean / decisions, (second - mean[:, :, None] * mean[:, None, :]) / decisions**2)


def _finding(name: str, model: str, moments: Moments, exact: Array, cost: float, paper: float) -> Finding:
    mean, variance = moments.mean.reshape(-1), float(moments.variance)
    truth = exact.reshape(-1)
    size, truth_size = float(jnp.linalg.norm(mean)), float(jnp.linalg.norm(truth))
    product = float(mean @ truth)
    # Float32 sums leave this much of a variance that is exactly zero.
    variance = 0.0 if variance < 1e-9 * max(paper, size**2) else variance
    snr = size**2 / variance if variance else float("inf")
    return Finding(
        name=name,
        model=model,
        bias=float(jnp.linalg.norm(mean - truth)) / truth_size,
        scale=product / truth_size**2,
        cosine=product / (size * truth_size) if size else float("nan"),
        variance=variance / paper,
        snr=snr,
        cost=cost,
        snr_per_cost=snr / cost,
    )
