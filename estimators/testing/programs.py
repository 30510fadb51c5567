"""What the checks of estimators compile: one pass, decoding, routing alone, and gradients."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from estimators.base import (
    AbstractEstimator,
    AbstractRouter,
    Boundaries,
    Keys,
    Layout,
    ObjectiveInputs,
    SamplingOptions,
    trainable,
)
from estimators.decode_state import update_state
from estimators.testing.subject import LENGTH, Text, program
from unet.hierarchy import StageSampling
from unet.losses import Prediction
from unet.model import TextState, UNet
from unet.ops import boundary_scan

TIGHT = 8
"""Tokens a row in the check of capacities."""


@program
def predict(model: UNet, text: Text, keys: Key[Array, " batch"]) -> Prediction:
    return model(text.bytes, key=keys, segments=text.segments, mask=text.mask)


@program
def predict_given(model: UNet, text: Text, actions: Bool[Array, "batch length"]) -> Prediction:
    return model(text.bytes, actions=actions, segments=text.segments, mask=text.mask, capacities=TIGHT)


@program
def decode(
    model: UNet, bytes: Int[Array, "batch length"], state: TextState, lengths: Int[Array, " batch"]
) -> tuple[Prediction, TextState]:
    there = jnp.arange(bytes.shape[1]) < lengths[:, None]
    decoded = model.decode(bytes, state, mask=there)
    return decoded.prediction, update_state(state, decoded.update, lengths)


@program
def route(
    router: AbstractRouter,
    hidden: Float[Array, "batch length dim"],
    layout: Layout,
    key: Keys | None,
    actions: Bool[Array, "batch length"] | None,
    training: bool,
) -> Boundaries:
    return router(hidden, layout, SamplingOptions(boundary_scan, key, actions, training=training))


@program
def pull(
    model: UNet, text: Text, keys: Key[Array, " batch"], row: Int[Array, ""], place: Int[Array, ""]
) -> Float[Array, "batch length dim"]:
    """The gradient, with respect to every embedding, of what is predicted and routed at one place in training."""
    embedded = model.embed(text.layout)

    def energy(offset: Float[Array, "batch length dim"]) -> Float[Array, ""]:
        output = model.stage(embedded + offset, text.layout, StageSampling(keys, training=True))
        drawn = output.levels[0].boundaries
        routed = [drawn.logits, drawn.probs, *([] if drawn.relaxed is None else [drawn.relaxed])]
        return jnp.sum(model.logits(output.hidden)[row, place] ** 2) + sum(one[row, place] for one in routed)

    return jax.grad(energy)(jnp.zeros_like(embedded))


@program
def loss_gradient(model: UNet, text: Text, key: PRNGKeyArray, samples: int) -> tuple[Float[Array, ""], UNet]:
    trains, fixed = eqx.partition(model, trainable(model))

    def loss(trains: UNet) -> Float[Array, ""]:
        whole = eqx.combine(trains, fixed)
        given = {"segments": text.segments, "mask": text.mask, "capacities": LENGTH // 2, "samples": samples}
        return whole.loss(text.bytes, key=key, **given).loss

    return jax.value_and_grad(loss)(trains)


@program
def router_gradient(
    estimator: AbstractEstimator, hidden: Float[Array, "batch length dim"], text: Text, key: PRNGKeyArray, samples: int
) -> tuple[AbstractEstimator, Float[Array, "batch length dim"]]:
    """The gradient of the objective and of some use of the chunker, for given hidden states, each row `samples` times."""
    layout, hidden = jax.tree.map(lambda leaf: jnp.repeat(leaf, samples, axis=0), (text.layout, hidden))
    trains, fixed = eqx.partition(estimator, trainable(estimator))
    scored = layout.mask & jnp.roll(layout.mask, -1, axis=1)
    log_prob = -5.0 * jax.random.uniform(jax.random.fold_in(key, 1), scored.shape, jnp.float32)
    early = log_prob - 1.0 if estimator.objective.needs_early_exit else None

    def loss(both: tuple[AbstractEstimator, Float[Array, "batch length dim"]]) -> Float[Array, ""]:
        whole, hidden = eqx.combine(both[0], fixed), both[1]
        boundaries = whole.router(hidden, layout, SamplingOptions(boundary_scan, key, training=True))
        inputs = ObjectiveInputs(boundaries, hidden, log_prob, early, scored, scored, samples=samples)
        tokens = whole.chunker.down(hidden, boundaries, capacity=LENGTH, mask=layout.mask).tokens
        spread = whole.chunker.up(jnp.tanh(tokens.values), tokens, hidden, boundaries).hidden
        return whole.objective(inputs).loss + jnp.sum(jnp.tanh(spread))

    return jax.grad(loss)((trains, hidden))
