"""Exact means and covariances of gradient estimators, by summing over all boundary strings.

A text of `length` bytes has `length - 1` decisions, at positions 1 to length - 1, and `length - 1` predictions, made at
positions 0 to length - 2. No prediction follows the last decision, so it has no gradient. All gradients are of the mean negative
log-likelihood per predicted byte, in nats, with respect to the logits of the decisions.

`experiments.laboratory.measure` obtains the same numbers from the shipped router, chunker and objective alone. These formulas
remain for what enumeration cannot reach: returns compared over a batch of long texts, continuous noise, DisARM (which the library
does not have), and gradients that a flow evaluates thousands of times.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from estimators import AbstractReduction, Boundaries, ObjectiveInputs, ScoreFunctionObjective
from estimators.equations import action_log_prob
from experiments.laboratory.subjects import RATE, PerDecision, PerString, Strings, Tables


class Moments(eqx.Module):
    """Of an estimator, for every text: its mean and the covariance of one sample."""

    mean: PerDecision
    covariance: Float[Array, "texts decisions decisions"]

    @property
    def variance(self) -> Float[Array, ""]:
        """The trace over all texts."""
        return jnp.sum(jnp.trace(self.covariance, axis1=1, axis2=2))


def string_probs(logits: PerDecision, strings: Strings) -> Float[Array, "texts strings"]:
    """The probability of every string under independent decisions with these logits."""

    def one(row: Float[Array, " decisions"]) -> Float[Array, " strings"]:
        drawn = strings[:, 1:]
        return jnp.exp(jnp.sum(action_log_prob(jnp.broadcast_to(row, drawn.shape), drawn), axis=1))

    return jax.vmap(one)(logits)


def score_of(logits: PerDecision, strings: Strings) -> PerString:
    """The derivative of log π(a) with respect to each logit: a - p."""
    return strings[None, :, 1:].astype(jnp.float32) - jax.nn.sigmoid(logits)[:, None]


def expected_loss(logits: PerDecision, tables: Tables, strings: Strings) -> Float[Array, " texts"]:
    """J: the expected mean negative log-likelihood of each text."""
    return -jnp.sum(string_probs(logits, strings) * jnp.mean(tables.log_prob, axis=2), axis=1)


@eqx.filter_jit
def exact_gradient(logits: PerDecision, tables: Tables, strings: Strings) -> PerDecision:
    """The derivative of J, by automatic differentiation of the sum over strings.

    Where the likelihood also depends on the probabilities, its derivative with respect to them is added.
    """
    through_draws = jax.grad(lambda row: jnp.sum(expected_loss(row, tables, strings)))(logits)
    probs = jax.nn.sigmoid(logits)
    by_probs = jnp.einsum("ts,tsd->td", string_probs(logits, strings), tables.by_probs)
    return through_draws - by_probs * probs * (1.0 - probs) / tables.log_prob.shape[2]


@eqx.filter_jit
def returns_by_string(
    reductions: tuple[AbstractReduction, ...],
    logits: PerDecision,
    strings: Strings,
    tables: Tables,
    *,
    behaviour: PerDecision | None = None,
    hidden: Float[Array, "texts decisions some_dim"] | None = None,
) -> PerString:
    """The returns that the shipped objective gives each decision of each string after `reductions`.

    `behaviour`, if given, are the logits of the policy that draws. `hidden`, if given, are the states that critics read; those
    of the forced first position are 0. The strings of one text are evaluated as one batch, so no reduction may compare the
    sequences of a batch.
    """
    shape, length = strings.shape, strings.shape[1]
    starts, scored = (
        jnp.broadcast_to(part, shape) for part in (jnp.arange(length) == 0, jnp.arange(length) < length - 1)
    )
    objective = ScoreFunctionObjective(reductions, RATE)
    hidden = jnp.zeros((*logits.shape, 1)) if hidden is None else hidden

    def spread(values: Float[Array, " decisions"]) -> Float[Array, "strings length"]:
        return jnp.broadcast_to(jnp.pad(values, (1, 0)), shape)

    def one(part: tuple[Array, Array | None, Tables, Array]) -> Float[Array, "strings decisions"]:
        row, drawn_by, text, states = part
        drawn_by = None if drawn_by is None else action_log_prob(spread(drawn_by), strings)
        boundaries = Boundaries(
            strings, spread(row), jax.nn.sigmoid(spread(row)), ~starts, starts, behaviour_log_prob=drawn_by
        )
        states = jnp.broadcast_to(jnp.pad(states, ((1, 0), (0, 0))), (*shape, states.shape[1]))
        log_prob = jnp.pad(text.log_prob, ((0, 0), (0, 1)))
        early = jnp.broadcast_to(jnp.pad(text.early_log_prob, (0, 1)), shape)
        return objective.advantages(ObjectiveInputs(boundaries, states, log_prob, early, scored, scored))[:, 1:]

    return jax.lax.map(one, (logits, behaviour, tables, hidden))


@eqx.filter_jit
def score_moments(
    logits: PerDecision,
    strings: Strings,
    returns: PerString,
    *,
    centring: str = "none",
) -> Moments:
    """The score function with these returns; `centring` over the texts.

    The mean of the other texts' returns is independent of a text's own draws, so that only its mean and covariance enter;
    the batch mean is the same times (B - 1)/B.
    """
    texts, _, decisions = returns.shape
    prob = string_probs(logits, strings)
    score = score_of(logits, strings)
    centre = jnp.zeros((texts, decisions))
    noise = jnp.zeros((texts, decisions, decisions))
    shrink = 1.0
    if centring != "none":
        mean = jnp.einsum("ts,tsd->td", prob, returns)
        spread = jnp.einsum("ts,tsd,tse->tde", prob, returns, returns) - mean[:, :, None] * mean[:, None, :]
        centre = (jnp.sum(mean, axis=0) - mean) / (texts - 1)
        noise = (jnp.sum(spread, axis=0) - spread) / (texts - 1) ** 2
        shrink = (texts - 1) / texts if centring == "batch" else 1.0
    sample = score * (returns - centre[:, None])
    mean = jnp.einsum("ts,tsd->td", prob, sample)
    second = jnp.einsum("ts,tsd,tse->tde", prob, sample, sample)
    second = second + jnp.einsum("ts,tsd,tse->tde", prob, score, score) * noise
    return _as_loss(mean, second, shrink, decisions)


@eqx.filter_jit
def sample_moments(logits: PerDecision, strings: Strings, returns: PerString, samples: int) -> Moments:
    r"""k-sample leave-one-out, the average over its k samples; of the covariance only the diagonal.

    It is the U-statistic of $\tfrac12 (s_x - s_y)(G_x - G_y)$ over pairs of draws, whose variance is known (Hoeffding 1948).
    """
    prob = string_probs(logits, strings)
    score = score_of(logits, strings)

    def moment(a: int, b: int) -> PerDecision:
        return jnp.einsum("ts,tsd->td", prob, score**a * returns**b)

    mean = moment(1, 1)
    one = 0.5 * (score * (returns - moment(0, 1)[:, None]) + mean[:, None])
    first = jnp.einsum("ts,tsd->td", prob, one**2) - mean**2
    square = 2 * moment(2, 2) - 4 * moment(2, 1) * moment(0, 1) + 2 * moment(2, 0) * moment(0, 2) + 4 * mean**2
    second = square / 4 - mean**2
    variance = 2 / (samples * (samples - 1)) * (2 * (samples - 2) * first + second)
    diagonal = jax.vmap(jnp.diag)(variance + mean**2)
    return _as_loss(mean, diagonal, 1.0, logits.shape[1], diagonal_only=True)


@eqx.filter_jit
def disarm_moments(logits: PerDecision, strings: Strings, tables: Tables) -> Moments:
    r"""DisARM (Dong, Mnih and Tucker 2020): two antithetic draws, both forward passes, unbiased.

    $\hat g_i = \tfrac12 (f(a) - f(\tilde a))\,(-1)^{\tilde a_i}\,1[a_i \ne \tilde a_i]\,\sigma(|l_i|)$ with $a_i = 1[u_i < p_i]$,
    $\tilde a_i = 1[1 - u_i < p_i]$. A decision has three outcomes: (1, 0) and (0, 1), each with probability
    min(p, 1 - p), and otherwise the more probable value twice. All combinations are summed.
    """
    decisions = logits.shape[1]
    outcomes = jnp.stack(jnp.meshgrid(*[jnp.arange(3)] * decisions, indexing="ij"), axis=-1).reshape(-1, decisions)
    place = 2 ** jnp.arange(decisions - 1, -1, -1)

    def one(pair: tuple[Float[Array, " decisions"], Float[Array, " strings"]]):
        row, value = pair
        probs = jax.nn.sigmoid(row)
        differs, probable = jnp.minimum(probs, 1.0 - probs), probs > 0.5
        first = jnp.where(outcomes == 2, probable, outcomes == 1)
        other = jnp.where(outcomes == 2, probable, outcomes == 0)
        prob = jnp.prod(jnp.where(outcomes == 2, 1.0 - 2.0 * differs, differs), axis=1)
        values = [value[jnp.sum(jnp.where(bits, place, 0), axis=1)] for bits in (first, other)]
        sign = jnp.where(outcomes == 2, 0.0, jnp.where(other, -1.0, 1.0))
        sample = 0.5 * (values[0] - values[1])[:, None] * sign * jax.nn.sigmoid(jnp.abs(row))
        return prob @ sample, jnp.einsum("o,od,oe->de", prob, sample, sample)

    mean, second = jax.lax.map(one, (logits, jnp.sum(tables.log_prob, axis=2)))
    return _as_loss(mean, second, 1.0, decisions)


@eqx.filter_jit
def relaxed_moments(logits: PerDecision, strings: Strings, tables: Tables, temperature: float | None) -> Moments:
    r"""Straight-through draws: $\hat g_i = \partial L/\partial a_i \cdot s'_i$ with $s'$ the slope of the relaxed draw, given
    the action; with no `temperature`, the slope p(1 - p) of the probability (Bengio et al. 2013).

    Given the actions the noises are independent, so that only $E[s'_i \mid a_i]$ and $E[s'^2_i \mid a_i]$ enter: integrals over
    one uniform number, by Gauss-Legendre quadrature.
    """
    prob = string_probs(logits, strings)
    drawn = strings[None, :, 1:]
    probs = jax.nn.sigmoid(logits)
    if temperature is None:
        slope = probs * (1.0 - probs)
        first = jnp.broadcast_to(slope[:, None], tables.by_actions.shape)
        second = first**2
    else:
        drawn_slope = _slopes(logits, 1.0 - probs, jnp.ones_like(probs), temperature)
        other_slope = _slopes(logits, jnp.zeros_like(probs), 1.0 - probs, temperature)

        def mean_power(power: int) -> PerString:
            of_drawn, of_other = ((slope**power @ _WEIGHTS)[:, None] for slope in (drawn_slope, other_slope))
            return jnp.where(drawn, of_drawn, of_other)

        first, second = mean_power(1), mean_power(2)
    mean = jnp.einsum("ts,tsd->td", prob, tables.by_actions * first)
    both = jnp.einsum("ts,tsd,tse->tde", prob, tables.by_actions * first, tables.by_actions * first)
    own = jnp.einsum("ts,tsd->td", prob, tables.by_actions**2 * (second - first**2))
    return _as_loss(mean, both + jax.vmap(jnp.diag)(own), 1.0, logits.shape[1])


@eqx.filter_jit
def moments_of(samples: PerString, logits: PerDecision, strings: Strings) -> Moments:
    """An estimator that is `samples`, gradients of summed log-likelihoods, of strings drawn with `logits`."""
    prob = string_probs(logits, strings)
    mean = jnp.einsum("ts,tsd->td", prob, samples)
    return _as_loss(mean, jnp.einsum("ts,tsd,tse->tde", prob, samples, samples), 1.0, logits.shape[1])


def pathwise(logits: PerDecision, tables: Tables) -> PerString:
    """The derivative of each string's summed log-likelihood through the probabilities alone, as in dynamic chunking."""
    probs = jax.nn.sigmoid(logits)[:, None]
    return tables.by_probs * probs * (1.0 - probs)


def _as_loss(
    mean: PerDecision,
    second: Float[Array, "texts decisions decisions"],
    shrink: float,
    decisions: int,
    diagonal_only: bool = False,
) -> Moments:
    """From the gradient of a summed log-likelihood, and its second moment, to moments of the mean loss's gradient."""
    outer = mean[:, :, None] * mean[:, None, :]
    if diagonal_only:
        outer = outer * jnp.eye(decisions)
    scale = shrink / decisions
    return Moments(-scale * mean, scale**2 * (second - outer))


def _slopes(
    logits: PerDecision, low: PerDecision, high: PerDecision, temperature: float
) -> Float[Array, "texts decisions nodes"]:
    """The slope of the relaxed draw with respect to the logit, for uniform numbers from `low` to `high`."""
    uniform = low[..., None] + (high - low)[..., None] * _NODES
    soft = jax.nn.sigmoid((logits[..., None] + jnp.log(uniform) - jnp.log1p(-uniform)) / temperature)
    return soft * (1.0 - soft) / temperature


_LEGENDRE = np.polynomial.legendre.leggauss(48)
_NODES = (0.5 * (_LEGENDRE[0] + 1.0)).astype(np.float32)
_WEIGHTS = (0.5 * _LEGENDRE[1]).astype(np.float32)
"""A quadrature on the unit interval."""
