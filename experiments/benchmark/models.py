"""Compilation time, memory, and training and evaluation speed of a whole model."""

from __future__ import annotations

from dataclasses import dataclass

import equinox as eqx
import jax

from data import Split
from experiments.benchmark.steps import compile_prepared, prepare_step
from experiments.benchmark.timing import time_interleaved
from experiments.config.settings import RunConfig
from experiments.evaluation.byte_results import evaluate_batch
from unet.likelihood import plain_layout


@dataclass(frozen=True)
class ModelReport:
    """`compile_seconds`: time to trace, lower and compile a training step. `peak_bytes`: its peak memory on each device, by XLA's
    analysis. `training`, `evaluation`: bytes of text per second, for batches sharded over the devices."""

    parameters: int
    compile_seconds: float
    peak_bytes: int
    training: float
    evaluation: float


def measure(config: RunConfig, split: Split, *, rounds: int, calls: int) -> ModelReport:
    """Measure the model of a run. Training steps and evaluation batches alternate; their medians count."""
    prepared = prepare_step(config, split)
    step, key = compile_prepared(config, prepared), jax.random.key(config.seed)
    batch = prepared.batches[0]
    layout = plain_layout(batch["bytes"], batch["segments"], batch["mask"])
    works = {
        "training": step.work,
        "evaluation": lambda: evaluate_batch(prepared.model, layout, key, prepared.capacity),
    }
    timings = time_interleaved(works, baseline="training", rounds=rounds, calls=calls)
    return ModelReport(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(prepared.model, eqx.is_inexact_array))),
        compile_seconds=step.seconds,
        peak_bytes=step.peak,
        training=config.bytes_per_step / timings["training"].seconds,
        evaluation=config.bytes_per_step / timings["evaluation"].seconds,
    )
