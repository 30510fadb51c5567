"""What the laboratory experiments on: short texts, a small model for each chunker, and tables over all boundary strings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from data import Split, open_batches
from estimators import (
    AbstractChunker,
    AbstractPositionwiseRouter,
    Boundaries,
    EarlyExit,
    Estimator,
    Layout,
    SamplingOptions,
    ScoreFunctionObjective,
)
from experiments.config.errors import ConfigError
from experiments.laboratory.measure import Strings, all_strings, with_router
from unet import UNet, UNetConfig, next_logprobs

SHAPE = UNetConfig(dim=32, heads=2, encoder_layers=1, main_layers=1, decoder_layers=1, window=8)
RATE = 0.2
"""The rate at which boundaries are drawn while a model is trained, and at which every experiment starts."""


PerDecision = Float[Array, "texts decisions"]
"""A number for each decision of each text."""
PerString = Float[Array, "texts strings decisions"]
"""A number for each decision of each string of each text."""


class TabularRouter(AbstractPositionwiseRouter):
    """A table with one boundary logit for each position of each sequence of a batch.

    `relaxed`, if given, are the actions as numbers, for gradients with respect to them.
    """

    logits: Float[Array, "batch length"]
    relaxed: Float[Array, "batch length"] | None = None

    @property
    def rate(self) -> float | None:
        return RATE

    def boundaries(
        self, hidden: Float[Array, "batch length dim"], layout: Layout, options: SamplingOptions
    ) -> Boundaries:
        probs = jax.nn.sigmoid(self.logits)
        actions = options.bernoulli(probs, layout)
        # A forced boundary is certain, as in H-Net's routing.
        probs = jnp.where(layout.starts, 1.0, probs)
        return Boundaries(actions, self.logits, probs, layout.free, layout.starts, self.relaxed)


class Subject(eqx.Module):
    """A trained model and the texts it is examined on."""

    model: UNet
    texts: Int[Array, "texts length"]

    @property
    def strings(self) -> Strings:
        """All boundary strings of the texts' length."""
        return all_strings(self.texts.shape[1] - 1)


class Tables(eqx.Module):
    """What every boundary string does to the likelihood of every text.

    Log-likelihoods of the `length - 1` predictions in nats, with the token level and without; the encoder's states at the
    deciding positions; the derivative of the summed log-likelihood with respect to the actions as numbers (0 where a chunker
    has none) and with respect to the probabilities that a chunker reads.
    """

    log_prob: Float[Array, "*texts strings decisions"]
    early_log_prob: Float[Array, "*texts decisions"]
    hidden: Float[Array, "*texts decisions dim"]
    by_actions: Float[Array, "*texts strings decisions"]
    by_probs: Float[Array, "*texts strings decisions"]


def train_subject(
    split: Split, chunker: AbstractChunker, *, length: int, optimizer: Optimizer, seed: int, key: PRNGKeyArray
) -> UNet:
    """A model trained for `optimizer.steps` steps of 64 texts under boundaries that follow nothing, so that it knows what to
    do with any string.

    Logits are drawn anew for every step, around the logit of `RATE` and wide enough that a chunker which reads probabilities
    meets all kinds of them. `seed` orders the texts. Models of one `optimizer` share one compiled step.
    """
    objective = ScoreFunctionObjective((EarlyExit(),), RATE, policy_weight=0.0, rate_weight=0.0)
    estimator = Estimator(TabularRouter(jnp.zeros((64, length))), chunker, objective)
    model = UNet(SHAPE, estimator, key=jax.random.fold_in(key, 0))
    return train(model, split, optimizer=optimizer, seed=seed, key=key, at_step=_with_random_logits)


def train(
    model: UNet,
    split: Split,
    *,
    optimizer: Optimizer,
    seed: int,
    key: PRNGKeyArray,
    samples: int = 1,
    at_step: Callable[[UNet, int, PRNGKeyArray], UNet] | None = None,
) -> UNet:
    """The model after `optimizer.steps` steps of 64 texts on its own training loss. `seed` orders the texts.

    `at_step(model, length, key)`, if given, is the model that a step trains.
    """
    batches = open_batches(split, batch=64, seed=seed)
    state = optimizer.rule.init(eqx.filter(model, eqx.is_inexact_array))
    for number in range(optimizer.steps):
        bytes, own = jnp.asarray(next(batches)["bytes"], jnp.int32), jax.random.fold_in(key, number + 1)
        model, state = _train_step(model, state, bytes, own, optimizer.rule, samples, at_step)
    batches.close()
    return model


class Optimizer(NamedTuple):
    """Adam with a learning rate that falls to 0 over so many steps."""

    steps: int
    rule: optax.GradientTransformation


def make_optimizer(steps: int) -> Optimizer:
    """For all models that are to be trained alike."""
    return Optimizer(steps, optax.adam(optax.cosine_decay_schedule(3e-3, steps)))


@eqx.filter_jit
def _train_step(
    model: UNet,
    state: optax.OptState,
    bytes: Int[Array, "batch length"],
    key: PRNGKeyArray,
    rule: optax.GradientTransformation,
    samples: int,
    at_step: Callable[[UNet, int, PRNGKeyArray], UNet] | None,
) -> tuple[UNet, optax.OptState]:
    key_step, key_draw = jax.random.split(key)

    def loss(model: UNet) -> Float[Array, ""]:
        changed = model if at_step is None else at_step(model, bytes.shape[1], key_step)
        return changed.loss(bytes, key=key_draw, samples=samples).loss

    updates, state = rule.update(eqx.filter_grad(loss)(model), state)
    return eqx.apply_updates(model, updates), state


def _with_random_logits(model: UNet, length: int, key: PRNGKeyArray) -> UNet:
    return with_logits(model, jax.scipy.special.logit(RATE) + 2.0 * jax.random.normal(key, (64, length)))


def held_out_texts(split: Split, *, count: int, length: int) -> Int[Array, "count length"]:
    """So many different texts that no model has seen. Raises `ConfigError` where there are fewer."""
    rows = split.held_out_rows(16 * count * length)
    whole = np.unique(np.stack([row["bytes"] for row in rows if row["mask"].all()]), axis=0)
    if len(whole) < count:
        raise ConfigError(
            f"--dataset holds out {len(whole)} different texts of {length} bytes, and --models, --sets and --texts ask for "
            f"{count}: ask for fewer, or name a larger data set"
        )
    return jnp.asarray(np.random.default_rng(0).permutation(whole)[:count], jnp.int32)


def with_logits(
    model: UNet, logits: Float[Array, "batch length"], relaxed: Float[Array, "batch length"] | None = None
) -> UNet:
    """The model with another table in its router."""
    return with_router(model, TabularRouter(logits, relaxed))


def with_chunker(subject: Subject, chunker: AbstractChunker) -> Subject:
    """The same model with another chunker that has the same parameters."""
    return dataclasses.replace(subject, model=eqx.tree_at(lambda m: m.stage.estimator.chunker, subject.model, chunker))


@eqx.filter_jit
def tabulate(subject: Subject, logits: PerDecision) -> Tables:
    """The tables at given logits of the free decisions, which matter to chunkers that read probabilities."""
    strings = subject.strings

    def one(text: Int[Array, " length"], row: Float[Array, " decisions"]) -> Tables:
        bytes = jnp.broadcast_to(text, strings.shape)
        logits = jnp.broadcast_to(jnp.pad(row, (1, 0)), strings.shape)

        def total(relaxed: Float[Array, "strings length"], shift: Float[Array, "strings length"]):
            model = with_logits(subject.model, logits + shift, relaxed)
            prediction = model(bytes, actions=(strings,), training=True)
            log_prob = next_logprobs(prediction.logits, bytes)
            return jnp.sum(log_prob), (log_prob, prediction)

        numbers = strings.astype(jnp.float32)
        gradient = jax.grad(total, argnums=(0, 1), has_aux=True)
        (by_actions, by_logits), (log_prob, prediction) = gradient(numbers, jnp.zeros_like(numbers))
        probs = jax.nn.sigmoid(row)
        assert prediction.early_logits is not None
        early = next_logprobs(prediction.early_logits[:1], bytes[:1])[0, :-1]
        hidden = prediction.levels[0].hidden[0, 1:]
        return Tables(log_prob[:, :-1], early, hidden, by_actions[:, 1:], by_logits[:, 1:] / (probs * (1.0 - probs)))

    return jax.lax.map(lambda pair: one(*pair), (subject.texts, logits))
