"""The vector fields of gradient flows, and the losses of policies.

Each is a function whose first arguments are bound with `equinox.Partial`, so that models of one shape share compiled programs.
"""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from estimators.equations import batch_centred
from experiments.laboratory.gradients import without_weights
from experiments.laboratory.greedy import at_a_point, greedy_losses, neighbourhood
from experiments.laboratory.moments import (
    exact_gradient,
    moments_of,
    pathwise,
    relaxed_moments,
    score_moments,
    string_probs,
)
from experiments.laboratory.subjects import PerDecision, PerString, Strings, Subject, Tables, tabulate


class StringLosses(eqx.Module):
    """The loss of each string of each text, and the price of a boundary at every byte, which is part of these losses."""

    losses: Float[Array, "texts strings"]
    strings: Strings
    price: Float[Array, ""]

    @property
    def best(self) -> Float[Array, " texts"]:
        """The loss of the best string of each text."""
        return jnp.min(self.losses, axis=1)

    def price_gradient(self, logits: PerDecision) -> PerDecision:
        """The derivative of the expected price."""
        probs = jax.nn.sigmoid(logits)
        return self.price * probs * (1.0 - probs) / logits.shape[1]


Field = Callable[[PerDecision, PRNGKeyArray], PerDecision]
"""From logits, and a key where it is drawn, a gradient of the mean loss of each text."""
PolicyLoss = Callable[[PerDecision, StringLosses], tuple[Float[Array, ""], Float[Array, ""]]]
"""The loss of a policy in nats per byte, price included, and its rate of boundaries; means over texts."""


def string_losses(log_prob: PerString, strings: Strings, rate: float = 0.3) -> StringLosses:
    """The price is the one at which the best strings of all texts together draw boundaries at about `rate`."""
    losses = -jnp.mean(log_prob, axis=2)
    low, high = 0.0, 10.0
    drawn = jnp.mean(strings[:, 1:], axis=1)
    for _ in range(40):
        middle = 0.5 * (low + high)
        best = jnp.argmin(losses + middle * drawn, axis=1)
        low, high = (middle, high) if float(jnp.mean(drawn[best])) > rate else (low, middle)
    price = jnp.asarray(0.5 * (low + high))
    return StringLosses(losses + price * drawn, strings, price)


def exact(tables: Tables, strings: Strings, logits: PerDecision, key: PRNGKeyArray) -> PerDecision:
    """The gradient of the expected loss."""
    return exact_gradient(logits, tables, strings)


def expected_score(returns: PerString, strings: Strings, logits: PerDecision, key: PRNGKeyArray) -> PerDecision:
    """The mean of the score function."""
    return score_moments(logits, strings, returns).mean


def expected_relaxed(
    tables: Tables, strings: Strings, temperature: float | None, logits: PerDecision, key: PRNGKeyArray
) -> PerDecision:
    """The mean of a straight-through estimator."""
    return relaxed_moments(logits, strings, tables, temperature).mean


def exact_smooth(subject: Subject, logits: PerDecision, key: PRNGKeyArray) -> PerDecision:
    """The gradient of the expected loss where likelihoods depend on the probabilities: the model runs at every step."""
    return exact_gradient(logits, tabulate(without_weights(subject), logits), subject.strings)


def expected_chunking(subject: Subject, logits: PerDecision, key: PRNGKeyArray) -> PerDecision:
    """The mean of dynamic chunking with drawn boundaries."""
    return moments_of(pathwise(logits, tabulate(subject, logits)), logits, subject.strings).mean


def greedy_chunking(subject: Subject, logits: PerDecision, key: PRNGKeyArray) -> PerDecision:
    """Dynamic chunking with greedy boundaries."""
    return at_a_point(subject, logits)


def greedy_neighbourhood(
    subject: Subject, scale: Float[Array, ""], samples: int, logits: PerDecision, key: PRNGKeyArray
) -> PerDecision:
    """An unbiased estimate of the gradient of the greedy loss, averaged over a neighbourhood."""
    unweighted = without_weights(subject)
    return neighbourhood(subject, unweighted, logits, key, scale=scale, samples=samples).gradient


def sampled_score(returns: PerString, centred: bool, logits: PerDecision, key: PRNGKeyArray) -> PerDecision:
    """The score function on one drawn string for each text, with returns `centred` over texts or not."""
    probs = jax.nn.sigmoid(logits)
    actions = jax.random.bernoulli(key, probs)
    chosen = jnp.take_along_axis(returns, string_index(actions)[:, None, None], axis=1)[:, 0]
    if centred:
        chosen = batch_centred(chosen, None, leave_one_out=False)
    return -(actions.astype(jnp.float32) - probs) * chosen / logits.shape[1]


def string_index(actions: Bool[Array, "*texts decisions"]) -> Array:
    """The index of a string among all strings, from its free actions."""
    return jnp.sum(jnp.where(actions, 2 ** jnp.arange(actions.shape[-1] - 1, -1, -1), 0), axis=-1)


def drawn_loss(subject: Subject | None, logits: PerDecision, by_string: StringLosses):
    """The loss of drawn boundaries. With a `subject` the likelihoods depend on the probabilities: its model runs."""
    losses = by_string.losses
    if subject is not None:
        log_prob = tabulate(without_weights(subject), logits).log_prob
        losses = -jnp.mean(log_prob, axis=2) + by_string.price * jnp.mean(by_string.strings[:, 1:], axis=1)
    loss = jnp.mean(jnp.sum(string_probs(logits, by_string.strings) * losses, axis=1))
    return loss, jnp.mean(jax.nn.sigmoid(logits))


def greedy_loss(subject: Subject, logits: PerDecision, by_string: StringLosses):
    """The loss of greedy boundaries."""
    rate = jnp.mean(logits > 0)
    return jnp.mean(greedy_losses(subject, logits)) + by_string.price * rate, rate
