"""What a flow follows and what it is judged by. Everything that differs between models is an array of a module, so that
models share compiled programs."""

from __future__ import annotations

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from estimators.equations import batch_centred
from experiments.laboratory.gradients import without_weights
from experiments.laboratory.greedy import Neighbourhood, at_a_point, greedy_losses, neighbourhood
from experiments.laboratory.moments import (
    exact_gradient,
    moments_of,
    pathwise,
    relaxed_moments,
    score_moments,
    string_probs,
)
from experiments.laboratory.subjects import PerDecision, PerString, Strings, Subject, Tables, tabulate


class AbstractField(eqx.Module):
    """A direction to descend, at logits and, where it is drawn, for a key."""

    @abstractmethod
    def __call__(self, logits: PerDecision, key: PRNGKeyArray) -> PerDecision:
        """A gradient of the mean loss of each text."""


class Exact(AbstractField):
    """The gradient itself."""

    tables: Tables
    strings: Strings

    def __call__(self, logits: PerDecision, key: PRNGKeyArray) -> PerDecision:
        return exact_gradient(logits, self.tables, self.strings)


class ExpectedScore(AbstractField):
    """The score function's mean."""

    returns: PerString
    strings: Strings

    def __call__(self, logits: PerDecision, key: PRNGKeyArray) -> PerDecision:
        return score_moments(logits, self.strings, self.returns).mean


class ExpectedRelaxed(AbstractField):
    """A straight-through estimator's mean."""

    tables: Tables
    strings: Strings
    temperature: float | None = eqx.field(static=True)

    def __call__(self, logits: PerDecision, key: PRNGKeyArray) -> PerDecision:
        return relaxed_moments(logits, self.strings, self.tables, self.temperature).mean


class ExactSmooth(AbstractField):
    """The gradient itself where likelihoods move with the probabilities, so that the model runs at every step."""

    subject: Subject

    def __call__(self, logits: PerDecision, key: PRNGKeyArray) -> PerDecision:
        return exact_gradient(logits, tabulate(without_weights(self.subject), logits), self.subject.strings)


class ExpectedChunking(AbstractField):
    """Dynamic chunking's mean, its boundaries drawn."""

    subject: Subject

    def __call__(self, logits: PerDecision, key: PRNGKeyArray) -> PerDecision:
        return moments_of(pathwise(logits, tabulate(self.subject, logits)), logits, self.subject.strings).mean


class GreedyChunking(AbstractField):
    """Dynamic chunking with greedy boundaries."""

    subject: Subject

    def __call__(self, logits: PerDecision, key: PRNGKeyArray) -> PerDecision:
        return at_a_point(self.subject, logits)


class GreedyNeighbourhood(AbstractField):
    """An unbiased estimate of the gradient of the greedy loss, averaged over a neighbourhood."""

    subject: Subject
    scale: Float[Array, ""]
    samples: int = eqx.field(static=True)

    def __call__(self, logits: PerDecision, key: PRNGKeyArray) -> PerDecision:
        around: Neighbourhood = neighbourhood(
            self.subject, without_weights(self.subject), logits, key, scale=self.scale, samples=self.samples
        )
        return around.gradient


class SampledScore(AbstractField):
    """The score function on one drawn string for each text, as in training: returns minus a `baseline`, `centred` or not."""

    returns: PerString
    baseline: PerDecision
    centred: bool = eqx.field(static=True)

    def __call__(self, logits: PerDecision, key: PRNGKeyArray) -> PerDecision:
        probs = jax.nn.sigmoid(logits)
        actions = jax.random.bernoulli(key, probs)
        returns = jnp.take_along_axis(self.returns, place_of(actions)[:, None, None], axis=1)[:, 0] - self.baseline
        if self.centred:
            returns = batch_centred(returns, None, leave_one_out=False)
        return -(actions.astype(jnp.float32) - probs) * returns / logits.shape[1]


def place_of(actions: Bool[Array, "*texts decisions"]) -> Array:
    """The place of a string among all, from its free actions."""
    return jnp.sum(jnp.where(actions, 2 ** jnp.arange(actions.shape[-1] - 1, -1, -1), 0), axis=-1)


class Landscape(eqx.Module):
    """The losses of all strings, price included, each read as certain; and the price of a boundary at every byte."""

    losses: Float[Array, "texts strings"]
    strings: Strings
    price: Float[Array, ""]

    @property
    def best(self) -> Float[Array, " texts"]:
        """Of the best string of each text."""
        return jnp.min(self.losses, axis=1)

    def charge(self, logits: PerDecision) -> PerDecision:
        """The derivative of the expected price."""
        probs = jax.nn.sigmoid(logits)
        return self.price * probs * (1.0 - probs) / logits.shape[1]


def landscape(log_prob: PerString, strings: Strings, rate: float = 0.3) -> Landscape:
    """The price is the one at which the best strings of all texts together draw boundaries at about `rate`."""
    losses = -jnp.mean(log_prob, axis=2)
    low, high = 0.0, 10.0
    drawn = jnp.mean(strings[:, 1:], axis=1)
    for _ in range(40):
        middle = 0.5 * (low + high)
        best = jnp.argmin(losses + middle * drawn, axis=1)
        low, high = (middle, high) if float(jnp.mean(drawn[best])) > rate else (low, middle)
    price = jnp.asarray(0.5 * (low + high))
    return Landscape(losses + price * drawn, strings, price)


class NoField(AbstractField):
    """No gradient of the likelihood: what the price does by itself."""

    def __call__(self, logits: PerDecision, key: PRNGKeyArray) -> PerDecision:
        return jnp.zeros_like(logits)


class AbstractJudge(eqx.Module):
    """The loss and the rate of a policy, means over texts, price included."""

    @abstractmethod
    def __call__(self, logits: PerDecision, ground: Landscape) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Loss in nats per byte, and rate of boundaries."""


class Drawn(AbstractJudge):
    """Of boundaries drawn; of the `subject`, where there is one, likelihoods move with the probabilities."""

    subject: Subject | None = None

    def __call__(self, logits: PerDecision, ground: Landscape) -> tuple[Float[Array, ""], Float[Array, ""]]:
        losses = ground.losses
        if self.subject is not None:
            log_prob = tabulate(without_weights(self.subject), logits).log_prob
            losses = -jnp.mean(log_prob, axis=2) + ground.price * jnp.mean(ground.strings[:, 1:], axis=1)
        loss = jnp.mean(jnp.sum(string_probs(logits, ground.strings) * losses, axis=1))
        return loss, jnp.mean(jax.nn.sigmoid(logits))


class Greedy(AbstractJudge):
    """Of greedy boundaries."""

    subject: Subject

    def __call__(self, logits: PerDecision, ground: Landscape) -> tuple[Float[Array, ""], Float[Array, ""]]:
        rate = jnp.mean(logits > 0)
        return jnp.mean(greedy_losses(self.subject, logits)) + ground.price * rate, rate
