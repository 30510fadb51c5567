"""Training steps of whole models, as `experiments.run` takes them, ready to be timed."""

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
    """The untrained model of a run; an entropy router without `--entropy.model` watches an untrained byte model."""
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
class Ready:
    """A training step before it is compiled, its first state, batches that lie on the devices, and the capacity: the
    most tokens of a sequence."""

    step: jax.stages.Wrapped
    model: UNet
    state: TrainState
    batches: list[dict[str, Array]]
    capacity: int


def ready(config: RunConfig, split: Split, *, capacities: Sequence[int] | None = None) -> Ready:
    """The step of a run; `capacities` take the place of those it would choose from."""
    placement = Placement.of(config)
    config = with_implementation(config)
    model = fresh_model(config, split)
    trainer = Trainer.on(config, model, split) if capacities is None else Trainer.of(config, model, capacities)
    stream = open_batches(split, batch=config.batch, seed=config.seed)
    batches = [placement.batch(next(stream)) for _ in range(4)]
    stream.close()
    state = placement.replicated(trainer.first_state())
    return Ready(compiled(trainer.step), model, state, batches, trainer.capacity)


def training_step(config: RunConfig, split: Split, *, capacities: Sequence[int] | None = None) -> Work:
    """One training step after another, each on the next of a few batches of `split` that already lie in memory."""
    one = ready(config, split, capacities=capacities)
    return in_a_row(one.step, one, jax.random.key(config.seed))


def in_a_row(step: Callable[..., tuple[TrainState, StepMetrics]], one: Ready, key: PRNGKeyArray) -> Work:
    """One step after another, from the first state on."""
    state, done = one.state, 0

    def work() -> PyTree[Array]:
        nonlocal state, done
        state, metrics = step(state, one.batches[done % len(one.batches)], jax.random.fold_in(key, done))
        done += 1
        return metrics

    return work


@dataclass(frozen=True)
class Steps:
    """Training steps by estimator, and of those that could not be built, why."""

    works: dict[str, Work]
    left_out: dict[str, str]


def of_estimators(config: RunConfig, names: Sequence[EstimatorName], split: Split) -> Steps:
    """A training step of every estimator in the model of `config`."""
    steps = Steps({}, {})
    for name in names:
        isotropic = IsotropicConfig(token_level=True) if name == "isotropic" else config.isotropic
        try:
            one = dataclasses.replace(config, estimator=name, isotropic=isotropic)
            steps.works[name] = training_step(one, split)
        except (ConfigError, ValueError) as error:
            steps.left_out[name] = str(error)
    return steps


def alternative_step(name: AlternativeName, config: RunConfig, split: Split) -> Work:
    """A plainer form of the training step of a run: a token level as long as the text (`padded`), attention over masked squares
    at the byte level (`square`), or the same model in eager PyTorch, with a policy that draws byte by byte (`pytorch`) and
    with one that need not (`pytorch-at-once`).

    Raises `ConfigError` where PyTorch is not installed.
    """
    if name == "padded":
        return training_step(config, split, capacities=(config.length,))
    if name == "square":
        unet = dataclasses.replace(transformer_shape(config), window=config.length)
        return training_step(dataclasses.replace(config, unet=unet), split)
    try:
        from experiments.benchmark.torch_unet import torch_step
    except ModuleNotFoundError as error:
        raise ConfigError(f"{name} is left out, since PyTorch is not there: pip install 'caesura-lm[bench]'") from error
    return torch_step(config, at_once=name == "pytorch-at-once")
