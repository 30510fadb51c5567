"""The noise of the policy's gradient in a model of ordinary size, measured by drawing boundaries again and again."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from data import open_batches
from estimators import (
    AbstractReduction,
    AbstractRouter,
    BatchCentre,
    Critic,
    Discount,
    EarlyExit,
    GeneralisedAdvantage,
    ObjectiveInputs,
    SampleCentre,
    SamplingOptions,
    ScoreFunctionObjective,
)
from estimators.equations import discounted_returns
from estimators.keys import named_key
from experiments.config.build import build_byte_model
from experiments.config.settings import RunConfig
from experiments.laboratory.results import Noise
from experiments.training.data import load_split
from experiments.training.step import compiled
from experiments.training.trainer import Trainer
from unet import UNet
from unet.flops import matrix_flops
from unet.likelihood import plain_layout
from unet.losses import byte_rewards, objective_inputs
from unet.ops import boundary_scan


def reduction_sets(dim: int, critic: Critic) -> dict[str, tuple[tuple[AbstractReduction, ...], int]]:
    """What is compared, with the draws each needs for a sequence."""
    paper = EarlyExit(), Discount(0.99), BatchCentre()
    advantage = eqx.tree_at(lambda g: g.critic, GeneralisedAdvantage(dim, 0.99, 0.9), critic)
    return {
        "early exit, γ = .99, batch centring (the paper)": (paper, 1),
        "no early exit": ((Discount(0.99), BatchCentre()), 1),
        "no centring": ((EarlyExit(), Discount(0.99)), 1),
        "γ = 1": ((EarlyExit(), BatchCentre()), 1),
        "none of the three": ((), 1),
        "γ = .95": ((EarlyExit(), Discount(0.95), BatchCentre()), 1),
        "γ = .9": ((EarlyExit(), Discount(0.9), BatchCentre()), 1),
        "γ = .8": ((EarlyExit(), Discount(0.8), BatchCentre()), 1),
        "leave-one-out centring": ((EarlyExit(), Discount(0.99), BatchCentre(True)), 1),
        "linear critic, no centring": ((EarlyExit(), Discount(0.99), critic), 1),
        "linear critic and batch centring": ((EarlyExit(), Discount(0.99), critic, BatchCentre()), 1),
        "λ = .9, no centring": ((EarlyExit(), advantage), 1),
        "2 samples, leave-one-out": ((EarlyExit(), Discount(0.99), SampleCentre()), 2),
        "4 samples, leave-one-out": ((EarlyExit(), Discount(0.99), SampleCentre()), 4),
    }


def noise(
    config: RunConfig, *, after: Sequence[int], draws: int, models: int, names: Collection[str] | None = None
) -> dict[int, list[list[Noise]]]:
    """Train `models` models of different seeds as `config` says; after so many steps draw boundaries `draws` times for one
    batch and compare the reductions (those of `names`, or all): for each number of steps and each model, in that order.

    `draws` is a multiple of 4. The critic is the least-squares one on the draws of another batch.
    """
    found: dict[int, list[list[Noise]]] = {steps: [] for steps in after}
    train = _Training(config, max(after, default=0))
    for number in range(models):
        for steps, model, (here, there) in train.stops(config.seed + number, sorted(found)):
            key = jax.random.fold_in(jax.random.key(config.seed + number), steps)
            signals = _signals(model, here, jax.random.split(jax.random.fold_in(key, 1), draws))
            other = _signals(model, there, jax.random.split(jax.random.fold_in(key, 2), 4))
            sets = reduction_sets(config.unet.widths[0], _fitted(config.unet.widths[0], other))
            chosen = {name: of for name, of in sets.items() if names is None or name in names}
            found[steps].append(_compared(config, model, signals, here, chosen))
    return found


def _compared(
    config: RunConfig,
    model: UNet,
    signals: ObjectiveInputs,
    bytes: Int[Array, "batch length"],
    sets: dict[str, tuple[tuple[AbstractReduction, ...], int]],
) -> list[Noise]:
    router = model.stage.estimators[0].router
    once = matrix_flops(model, rate=config.rate).total
    found = []
    for name, (reductions, samples) in sets.items():
        objective = ScoreFunctionObjective(reductions, config.rate)
        gradients = _gradients(objective, router, signals, bytes, samples)
        variance = float(jnp.sum(jnp.var(gradients, axis=0, ddof=1)))
        # The mean of few draws is itself noisy: what noise adds to its square is taken off.
        signal = float(jnp.sum(jnp.mean(gradients, axis=0) ** 2)) - variance / len(gradients)
        flops = matrix_flops(model, rate=config.rate, samples=samples).total / once
        found.append(Noise(name, variance, signal, flops))
    return found


class _Training:
    """Runs of different seeds that share one compiled step, for up to `steps` steps."""

    def __init__(self, config: RunConfig, steps: int):
        # A constant learning rate: this is the beginning of a longer run.
        settings = dataclasses.replace(config.optimizer, final_fraction=1.0, warmup_bytes=config.bytes_per_step)
        self.config = dataclasses.replace(config, optimizer=settings, steps=max(steps, 2))
        self.split = load_split(self.config)
        # As many tokens as bytes, so that no boundary is dropped.
        self.trainer = Trainer.of(self.config, self._model(0), (config.length,))
        self.step = compiled(self.trainer.step)

    def _model(self, seed: int) -> UNet:
        return build_byte_model(self.config, jax.random.key(seed))

    def stops(
        self, seed: int, after: Sequence[int]
    ) -> Iterator[tuple[int, UNet, tuple[Int[Array, "batch length"], Int[Array, "batch length"]]]]:
        """The model after each number of steps, rising, and two batches that it is not trained on."""
        key = named_key(jax.random.key(seed), "steps")
        state = self.trainer.first_state(self._model(seed))
        batches = open_batches(self.split, batch=self.config.batch, seed=seed)
        here, there = (jnp.asarray(next(batches)["bytes"], jnp.int32) for _ in range(2))
        done = 0
        for stop in after:
            for number in range(done, stop):
                batch = next(batches)
                arrays = {"bytes": batch["bytes"], "segments": batch["segments"], "mask": batch["mask"]}
                state, _ = self.step(state, jax.tree.map(jnp.asarray, arrays), jax.random.fold_in(key, number))
            done = stop
            yield stop, self.trainer.model(state.params).unet, (here, there)
        batches.close()


@eqx.filter_jit
def _signals(model: UNet, bytes: Int[Array, "batch length"], keys: Key[Array, " draws"]) -> ObjectiveInputs:
    """What the objective sees in each draw, stacked."""
    objective, layout = model.stage.estimators[0].objective, plain_layout(bytes)

    def one(key: PRNGKeyArray) -> ObjectiveInputs:
        prediction = model(bytes, key=key, training=True)
        reward = byte_rewards(prediction, layout)
        return objective_inputs(reward, prediction.levels, [objective], target_rate=None, samples=1)[0]

    return jax.lax.map(one, keys)


@eqx.filter_jit
def _gradients(
    objective: ScoreFunctionObjective,
    router: AbstractRouter,
    signals: ObjectiveInputs,
    bytes: Int[Array, "batch length"],
    samples: int,
) -> Float[Array, "steps weights"]:
    """The gradient of the policy loss in each step, a step using `samples` draws for each of its sequences."""
    layout = plain_layout(jnp.repeat(bytes, samples, axis=0))

    def together(leaf: Array) -> Array:
        # draws batch … -> steps batch·samples …, the draws for a sequence neighbours
        grouped = leaf.reshape(-1, samples, *leaf.shape[1:])
        return jnp.swapaxes(grouped, 1, 2).reshape(grouped.shape[0], -1, *leaf.shape[2:])

    grouped = jax.tree.map(together, signals)

    def gradient(inputs: ObjectiveInputs) -> Float[Array, " weights"]:
        def loss(router: AbstractRouter) -> Float[Array, ""]:
            options = SamplingOptions(boundary_scan, actions=inputs.boundaries.actions, training=True)
            boundaries = router(inputs.hidden, layout, options)
            seen = dataclasses.replace(inputs, boundaries=boundaries, samples=samples)
            return objective(seen).metrics["policy_loss"]

        return ravel_pytree(eqx.filter_grad(loss)(router))[0]

    return jax.lax.map(gradient, grouped)


def _fitted(dim: int, signals: ObjectiveInputs) -> Critic:
    """The least-squares critic of the returns in all draws, with a little ridge."""
    early = signals.early_log_prob
    assert early is not None
    rewards = jnp.where(signals.mask, signals.log_prob - early, 0.0)
    returns = jax.vmap(lambda r, c: discounted_returns(r, 0.99, c))(rewards, signals.continues)
    features = jnp.concatenate(
        [signals.hidden.reshape(-1, dim), jnp.ones((returns.size, 1))], axis=1
    ) * signals.mask.reshape(-1, 1)
    ridge = 1e-3 * returns.size * jnp.eye(dim + 1)
    weights = jnp.linalg.solve(features.T @ features + ridge, features.T @ returns.reshape(-1))
    return eqx.tree_at(lambda c: (c.weight, c.bias), Critic(dim), (weights[:-1], weights[-1]))
