"""What a whole model takes on this machine: to compile, in memory, to train and to evaluate."""

from __future__ import annotations

import time
from dataclasses import dataclass

import equinox as eqx
import jax

from data import Split
from experiments.benchmark.steps import in_a_row, ready
from experiments.benchmark.timing import in_turns
from experiments.config.settings import RunConfig
from experiments.evaluation.evaluate import evaluate_batch
from unet.likelihood import plain_layout


@dataclass(frozen=True)
class ModelReport:
    """`parameters`; seconds to trace, lower and compile a training step, and bytes that it takes at its peak on each device, by
    XLA's account; bytes of text per second in training and in evaluation, both of batches spread over the devices."""

    parameters: int
    compile_seconds: float
    peak_bytes: int
    training: float
    evaluation: float


def measure(config: RunConfig, split: Split, *, rounds: int, calls: int) -> ModelReport:
    """Measure the model of a run; medians of training steps and of evaluated batches, in turns."""
    one = ready(config, split)
    key = jax.random.key(config.seed)
    started = time.perf_counter()
    step = one.step.lower(one.state, one.batches[0], key).compile()
    seconds = time.perf_counter() - started
    memory = step.memory_analysis()
    assert memory is not None
    batch = one.batches[0]
    layout = plain_layout(batch["bytes"], batch["segments"], batch["mask"])
    train = in_a_row(step, one, key)
    works = {"training": train, "evaluation": lambda: evaluate_batch(one.model, layout, key, one.capacity)}
    timings = in_turns(works, baseline="training", rounds=rounds, calls=calls)
    return ModelReport(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(one.model, eqx.is_inexact_array))),
        compile_seconds=seconds,
        peak_bytes=memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        training=config.bytes_per_step / timings["training"].seconds,
        evaluation=config.bytes_per_step / timings["evaluation"].seconds,
    )
