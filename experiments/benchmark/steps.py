"""Training steps of whole models, the same as in `experiments.run`, to be timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from data import Split, open_batches
from estimators.keys import named_key
from experiments.benchmark.timing import Work
from experiments.config.errors import ConfigError
from experiments.config.registry import ByteModel, Prepared, build_model
from experiments.config.sections import IsotropicConfig
from experiments.config.settings import EstimatorName, RunConfig, transformer_shape
from experiments.training.placement import Placement, with_implementation
from experiments.training.prepared import prepare, threshold_of
from experiments.training.step import StepMetrics, TrainState, compiled
from experiments.training.trainer import Trainer
from unet import UNet

AlternativeName = Literal["padded", "square", "pytorch", "pytorch-at-once"]


def fresh_model(config: RunConfig, split: Split) -> UNet:
    """The untrained model of a run. An entropy router without `--entropy.model` gets an untrained byte model."""
    key = jax.random.key(config.seed)
    if config.estimator == "entropy" and config.entropy.model is None:
        isotropic = dataclasses.replace(config, estimator="isotropic")
        byte_model = UNet(config.unet, None, key=named_key(key, "byte model"))
        prepared = Prepared(
            byte_model=ByteModel(isotropic, byte_model), threshold=threshold_of(config, byte_model, split)
        )
    else:
        prepared = prepare(config, split)
    return build_model(config, key, prepared)


@dataclass(frozen=True)
class PreparedStep:
    """A training step before compilation, its first state, batches on the devices, and the capacity (maximum tokens per
    sequence)."""

    step: jax.stages.Wrapped
    model: UNet
    state: TrainState
    batches: list[dict[str, Array]]
    capacity: int


def prepare_step(config: RunConfig, split: Split, *, capacities: Sequence[int] | None = None) -> PreparedStep:
    """The training step of a run. `capacities`: replacement for the capacities of the run."""
    placement = Placement.of(config)
    config = with_implementation(config)
    model = fresh_model(config, split)
    trainer = Trainer.on(config, model, split) if capacities is None else Trainer.of(config, model, capacities)
    stream = open_batches(split, batch=config.batch, seed=config.seed)
    batches = [placement.batch(next(stream)) for _ in range(4)]
    stream.close()
    state = placement.replicated(trainer.first_state())
    return PreparedStep(compiled(trainer.step), model, state, batches, trainer.capacity)


def training_step(config: RunConfig, split: Split, *, capacities: Sequence[int] | None = None) -> Work:
    """Consecutive training steps of a run, on a few batches of `split` that are already on the devices."""
    prepared = prepare_step(config, split, capacities=capacities)
    return repeated_steps(prepared.step, prepared, jax.random.key(config.seed))


def repeated_steps(
    step: Callable[..., tuple[TrainState, StepMetrics]], prepared: PreparedStep, key: PRNGKeyArray
) -> Work:
    """A function whose calls are consecutive training steps from the first state."""
    state, done = prepared.state, 0

    def work() -> PyTree[Array]:
        nonlocal state, done
        state, metrics = step(state, prepared.batches[done % len(prepared.batches)], jax.random.fold_in(key, done))
        done += 1
        return metrics

    return work


@dataclass(frozen=True)
class EstimatorSteps:
    """Training steps by estimator. `left_out`: the error messages for estimators that could not be built."""

    works: dict[str, Work]
    left_out: dict[str, str]


def estimator_steps(config: RunConfig, names: Sequence[EstimatorName], split: Split) -> EstimatorSteps:
    """The training step of each estimator in the model of `config`."""
    steps = EstimatorSteps({}, {})
    for name in names:
        isotropic = IsotropicConfig(token_level=True) if name == "isotropic" else config.isotropic
        try:
            run = dataclasses.replace(config, estimator=name, isotropic=isotropic)
            steps.works[name] = training_step(run, split)
        except (ConfigError, ValueError) as error:
            steps.left_out[name] = str(error)
    return steps


def alternative_step(name: AlternativeName, config: RunConfig, split: Split) -> Work:
    """A simpler implementation of the training step of a run.

    `padded`: a token level as long as the text. `square`: dense attention at the byte level, by a window of the whole text.
    `pytorch`: the same model in eager PyTorch, with a policy that samples byte by byte. `pytorch-at-once`: the same with a policy
    that ignores previous actions and samples all bytes at once. Raises `ConfigError` if PyTorch is not installed.
    """
    if name == "padded":
        return training_step(config, split, capacities=(config.length,))
    if name == "square":
        unet = dataclasses.replace(transformer_shape(config), window=config.length)
        return training_step(dataclasses.replace(config, unet=unet), split)
    try:
        from experiments.benchmark.torch_unet import torch_step
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{name} is left out, since PyTorch is not installed: pip install 'caesura-lm[bench]'"
        ) from error
    return torch_step(config, at_once=name == "pytorch-at-once")
