"""Training steps of whole models, the same as in `experiments.run`, to be timed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
from jaxtyping import Array, PRNGKeyArray, PyTree

from data import Split, open_batches
from estimators.keys import named_key
from experiments.benchmark.timing import Work
from experiments.config.build import build_byte_model
from experiments.config.errors import ConfigError
from experiments.config.settings import RunConfig, transformer_shape
from experiments.training.data import text_of
from experiments.training.placement import Placement, with_implementation
from experiments.training.prepared import prepare
from experiments.training.step import StepMetrics, TrainState, compiled
from experiments.training.text import RunText
from experiments.training.trainer import Trainer
from unet import UNet

AlternativeName = Literal["padded", "square", "pytorch", "pytorch-at-once"]


class UntrainedText(RunText):
    """The text of a run; the model of another run that is asked for is an untrained one."""

    def byte_model(self, where: str) -> UNet:
        key = named_key(jax.random.key(self.config.seed), "byte model")
        return UNet(self.config.unet, None, key=key)


def fresh_model(config: RunConfig, split: Split) -> UNet:
    """The untrained model of a run. An estimator that reads the model of another run gets an untrained one if none is named."""
    needs, key = config.first.prerequisite, jax.random.key(config.seed)
    if needs is None or getattr(config.first, needs.setting) is not None:
        return build_byte_model(config, key, prepare(config, split))
    config = config.with_settings(**{config.parts[0].estimator.section: {needs.setting: "untrained"}})
    return build_byte_model(config, key, config.first.prepare(UntrainedText(config, split)))


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
    batches = [placement.inputs(model.inputs(text_of(next(stream)))) for _ in range(4)]
    stream.close()
    state = placement.divided(trainer.first_state())
    return PreparedStep(compiled(trainer.step_on(placement)), model, state, batches, trainer.capacity)


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
class Compiled:
    """A compiled training step: `work` takes the next one. `seconds`: what tracing, lowering and compiling took. `peak`: the
    memory that it needs on each device, by XLA's account."""

    work: Work
    seconds: float
    peak: int


def compiled_step(config: RunConfig, split: Split) -> Compiled:
    """The training step of a run, compiled."""
    return compile_prepared(config, prepare_step(config, split))


def compile_prepared(config: RunConfig, prepared: PreparedStep) -> Compiled:
    """The same of a run whose step is `prepared`."""
    key = jax.random.key(config.seed)
    started = time.perf_counter()
    step = prepared.step.lower(prepared.state, prepared.batches[0], key).compile()
    seconds = time.perf_counter() - started
    memory = step.memory_analysis()
    assert memory is not None
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return Compiled(repeated_steps(step, prepared, key), seconds, peak)


@dataclass(frozen=True)
class EstimatorSteps:
    """Training steps by estimator. `left_out`: the error messages for estimators that could not be built."""

    works: dict[str, Work]
    left_out: dict[str, str]


def estimator_steps(config: RunConfig, names: Sequence[str], split: Split) -> EstimatorSteps:
    """The training step of each estimator in the model of `config`."""
    steps = EstimatorSteps({}, {})
    for name in names:
        try:
            steps.works[name] = training_step(dataclasses.replace(config, estimator=name), split)
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
