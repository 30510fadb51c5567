"""How fast everything is on this machine, as ratios to plain alternatives: `python -m experiments.bench`."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro

from data import DataError
from experiments.benchmark.steps import of_estimators
from experiments.benchmark.timing import Timing, in_turns
from experiments.config import ConfigError, EstimatorName, ModelName, check
from experiments.display import Display
from experiments.folder import json_text, write_atomically
from experiments.launch import with_large_pages
from experiments.presets import PRESETS
from experiments.registry import REGISTRY
from experiments.train import load_split


@dataclass(frozen=True)
class BenchConfig:
    """Measure this machine at the work that training does."""

    estimators: tuple[EstimatorName, ...] = tuple(REGISTRY)
    """Estimators whose training step is timed against that of uniform boundaries."""
    dataset: str = "docs"
    """Text to work on: anything that --dataset of experiments.run takes."""
    model: ModelName = "tiny"
    """Preset whose training step is timed."""
    batch: int | None = None
    """Sequences per step, instead of the preset's."""
    length: int | None = None
    """Bytes per sequence, instead of the preset's."""
    rounds: int = 7
    """Times that every alternative is measured, in turns; medians are reported."""
    calls: int = 5
    """Steps that each measurement takes together."""
    json: Path | None = None
    """Also write what was measured to this file."""


def bench_estimators(config: BenchConfig, display: Display) -> dict[str, Timing]:
    """The training step of every estimator, against uniform boundaries. Raises `ConfigError` and `DataError`."""
    run = dataclasses.replace(PRESETS[config.model], dataset=config.dataset)
    run = dataclasses.replace(run, batch=config.batch or run.batch, length=config.length or run.length)
    check(run)
    others = [name for name in config.estimators if name != "uniform"]
    names: list[EstimatorName] = ["uniform", *others]
    display.note(f"compiling a training step of {config.model} for {len(names)} estimators")
    works = of_estimators(run, names, load_split(run))
    timings = in_turns(works, baseline="uniform", rounds=config.rounds, calls=config.calls)
    display.note(timing_table(timings, "estimator", run.bytes_per_step))
    return timings


def timing_table(timings: Mapping[str, Timing], what: str, bytes_per_call: int) -> str:
    """Speeds and ratios in Markdown."""
    lines = [f"| {what} | kB/s | times the speed of `uniform` |", "|---|---|---|"]
    for name, timing in timings.items():
        lines.append(f"| `{name}` | {bytes_per_call / timing.seconds / 1e3:.1f} | {timing.speedup:.2f} |")
    return "\n".join(lines) + "\n"


def bench(config: BenchConfig, display: Display) -> None:
    """Measure, say what was measured, and write it down where asked. Raises `ConfigError` and `DataError`."""
    if config.rounds < 1 or config.calls < 1:
        raise ConfigError("--rounds and --calls must be at least 1")
    timings = bench_estimators(config, display)
    if config.json is not None:
        found = {name: dataclasses.asdict(timing) for name, timing in timings.items()}
        write_atomically(config.json, json_text({"settings": dataclasses.asdict(config), "estimators": found}))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, or 2 for a user's error."""
    display = Display()
    jax.config.update("jax_num_cpu_devices", min(2, os.cpu_count() or 1))
    try:
        given = sys.argv[1:] if arguments is None else list(arguments)
        bench(tyro.cli(BenchConfig, prog="python -m experiments.bench", args=given), display)
    except (ConfigError, DataError) as error:
        display.note(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    with_large_pages("experiments.bench")
    sys.exit(main())
