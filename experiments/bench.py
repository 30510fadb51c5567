"""How fast everything is on this machine, as ratios to plain alternatives: `python -m experiments.bench`."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import tyro

from experiments.benchmark.models import ModelReport, measure
from experiments.benchmark.ops import Compared, Sizes, compare_operations
from experiments.benchmark.overhead import Overhead, overhead
from experiments.benchmark.rates import RateReport, token_level
from experiments.benchmark.recurrence import RecurrenceReport, recurrence
from experiments.benchmark.roofline import Share
from experiments.benchmark.steps import WayName, of_estimators, plainer_way, training_step
from experiments.benchmark.timing import Timing, in_turns
from experiments.benchmark.whole_step import StepReport, compile_elsewhere
from experiments.benchmark.writing import CacheReport, WritingReport, measure_caches, measure_writing
from experiments.comparison.intervals import ALIKE, CONFIDENCE
from experiments.config.errors import ConfigError
from experiments.config.presets import PRESETS
from experiments.config.registry import REGISTRY
from experiments.config.settings import EstimatorName, ModelName, RunConfig
from experiments.launch import with_large_pages
from experiments.reporting.display import Display, exit_code
from experiments.training.data import load_split
from experiments.training.run_dir import json_text, write_atomically
from unet.config import UNetConfig
from unet.ops import Implementation

INTERVALS = (
    f"In brackets: an interval that holds the median ratio over rounds with a confidence of {CONFIDENCE:.0%}, which takes 6 "
    f"rounds; {ALIKE} not distinguishable: it contains 1, or there is none."
)


@dataclass(frozen=True)
class BenchConfig:
    """Measure this machine at the work that training does."""

    estimators: tuple[EstimatorName, ...] = tuple(REGISTRY)
    """Estimators whose training step is timed against that of uniform boundaries."""
    dataset: str = "docs"
    """Text to work on: anything that --dataset of experiments.run takes."""
    model: ModelName = "tiny"
    """Preset whose training step is timed."""
    rate: float | None = None
    """Target rate of the estimators, instead of the preset's."""
    early_share: float | None = None
    """Share of rows at which the early head predicts, instead of the preset's."""
    batch: int | None = None
    """Sequences per step, instead of the preset's."""
    length: int | None = None
    """Bytes per sequence, instead of the preset's."""
    compile_for: Literal["h100", "b200"] | None = None
    """Instead of timing anything: compile the training step for this GPU, which need not be there, and say what it needs."""
    alternatives: bool = False
    """Instead: the training step of --estimator sfe against plainer ways to the same end, PyTorch among them where it is
    installed."""
    ways: tuple[WayName, ...] = ("padded", "square", "pytorch", "pytorch-at-once")
    """Which of them: a padded token level, attention over masked squares, eager PyTorch drawing byte by byte or at once. One that
    needs much memory slows down those after it, so that long sequences are best measured one way at a time."""
    remat: bool | None = None
    """Recompute blocks in the backward pass, instead of what the preset says."""
    models: tuple[ModelName, ...] = ()
    """Instead: what each of these presets takes to compile, in memory, to train and to evaluate, with --estimator."""
    rates: bool = False
    """Instead: how the time of the token level of --model follows the rate of boundaries."""
    ops: bool = False
    """Instead: every ragged operation against a plain way to the same result, and dynamic chunking against that of the package
    h-net-dynamic-chunking where it is installed."""
    writing: tuple[ModelName, ...] = ()
    """Instead: what it takes to write byte by byte with each of these presets, alone and in a batch, against a pass over the
    whole text for each byte; and what the caches hold."""
    recurrence: bool = False
    """Instead: the recurrence of a Mamba-2 layer of width 512 at several lengths, and against a plain scan."""
    overhead: bool = False
    """Instead: what the score function adds to a step whose boundaries are given, in operations for every preset of transformer
    blocks and in time for --model."""
    estimator: EstimatorName = "sfe"
    """Estimator of the steps of --compile-for and --models."""
    compute: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the matrix products that are compiled."""
    implementation: Literal["both", "kernels", "xla"] = "both"
    """Compile with the kernels, without them, or once each."""
    rounds: int = 7
    """Times that every alternative is measured, in turns; medians are reported, from 6 on with their intervals."""
    calls: int = 5
    """Steps that each measurement takes together."""
    json: Path | None = None
    """Also write what was measured to this file."""


def bench_estimators(config: BenchConfig, display: Display) -> dict[str, Timing]:
    """The training step of every estimator, against uniform boundaries. Raises `ConfigError` and `DataError`."""
    run = preset(config, "uniform")
    others = [name for name in config.estimators if name != "uniform"]
    names: list[EstimatorName] = ["uniform", *others]
    display.note(f"compiling a training step of {config.model} for {len(names)} estimators")
    steps = of_estimators(run, names, load_split(run))
    for name, reason in steps.left_out.items():
        display.note(f"{name} is left out: {reason}")
    timings = in_turns(steps.works, baseline="uniform", rounds=config.rounds, calls=config.calls)
    display.note(timing_table(timings, "estimator", run.bytes_per_step))
    return timings


def bench_alternatives(config: BenchConfig, display: Display) -> dict[str, Timing]:
    """The training step against plainer ways to the same end, one at a time. Raises `ConfigError` and `DataError`."""
    run = preset(config, "sfe")
    split = load_split(run)
    display.note(f"a training step of {config.model}, {run.batch} x {run.length} bytes, against others; minutes")
    own, found = training_step(run, split), {}
    for name in config.ways:
        try:
            other = plainer_way(name, run, split)
        except ConfigError as lack:
            display.note(str(lack))
            continue
        pair = in_turns({"caesura": own, name: other}, baseline="caesura", rounds=config.rounds, calls=config.calls)
        display.note(timing_table(pair, "way", run.bytes_per_step, baseline="caesura"))
        found[name] = pair[name]
    return found


def bench_rates(config: BenchConfig, display: Display) -> dict[str, RateReport]:
    """The token level at several rates. Raises `ConfigError`."""
    run = preset(config, "stride")
    display.note(f"the token level of {config.model}, {run.batch} x {run.length} bytes, forward and backward; minutes")
    found = token_level(run, rounds=config.rounds, calls=config.calls)
    lines = ["| rate | ms | per token, relative to a rate of 0.5 |", "|---|---|---|"]
    lines += [f"| {name} | {one.seconds * 1e3:.0f} | {one.per_token:.2f} |" for name, one in found.items()]
    display.note("\n".join(lines) + "\n")
    return found


def bench_recurrence(config: BenchConfig, display: Display) -> dict[str, RecurrenceReport]:
    """The state-space recurrence and its gradient."""
    display.note(
        "the recurrence of a Mamba-2 layer of width 512, states of 128 columns, forward and backward; a minute"
    )
    found = recurrence(512, 128, rounds=config.rounds, calls=config.calls)
    lines = ["| rows | ms | a row, relative to the first | times the speed of a plain scan |", "|---|---|---|---|"]
    for name, one in found.items():
        scan = "" if one.times_a_scan is None else f"{one.times_a_scan:.1f}"
        lines.append(f"| {name} | {one.seconds * 1e3:.0f} | {one.per_row:.2f} | {scan} |")
    display.note("\n".join(lines) + "\n")
    return found


def bench_operations(config: BenchConfig, display: Display) -> dict[str, Compared]:
    """Ragged operations against plain ways, one pair at a time."""
    sizes = Sizes()
    what = f"{sizes.batch} x {sizes.length} rows of {sizes.dim}, {sizes.rate:.2f} boundaries a row"
    display.note(f"operations on {what}, with their gradients where they have one")
    found = compare_operations(sizes, rounds=config.rounds, calls=config.calls)
    lines = [f"| operation | ms | instead of | times its speed, {CONFIDENCE:.0%} interval |", "|---|---|---|---|"]
    for name, one in found.items():
        lines.append(f"| {name} | {one.own.seconds * 1e3:.1f} | {one.other} | {one.own.ratio} |")
    display.note("\n".join([*lines, "", INTERVALS]) + "\n")
    return found


def bench_models(config: BenchConfig, display: Display) -> dict[str, ModelReport]:
    """Whole models on this machine. Raises `ConfigError` and `DataError`."""
    found: dict[str, ModelReport] = {}
    lines = [
        "| preset | parameters | batch | to compile | memory | training | evaluation |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in config.models:
        run = preset(dataclasses.replace(config, model=name), config.estimator)
        display.note(f"measuring {name}, {run.batch} x {run.length} bytes")
        one = found[name] = measure(run, load_split(run), rounds=config.rounds, calls=config.calls)
        lines.append(
            f"| `{name}` | {one.parameters / 1e6:.1f} M | {run.batch} × {run.length} | {one.compile_seconds:.0f} s "
            f"| {one.peak_bytes / 2**30:.2f} GiB | {one.training / 1e3:.1f} kB/s | {one.evaluation / 1e3:.1f} kB/s |"
        )
    display.note("\n".join(lines) + "\n")
    return found


def bench_writing(config: BenchConfig, display: Display) -> dict[str, WritingReport | CacheReport]:
    """Writing and its caches. Raises `ConfigError` and `DataError`."""
    found: dict[str, WritingReport | CacheReport] = {}
    lines = [
        "| preset | a byte, against a pass | bytes/s | in a batch of 16 | ratio | steps with the token level | share of time |",
        "|---|---|---|---|---|---|---|",
    ]
    kept = ["| preset | context | kept at the byte level | at the token level | tokens |", "|---|---|---|---|---|"]
    for name in config.writing:
        run = preset(dataclasses.replace(config, model=name), config.estimator)
        split = load_split(run)
        display.note(f"writing with {name}; minutes")
        one = found[name] = measure_writing(run, split, rounds=config.rounds)
        lines.append(
            f"| `{name}` | {one.speedup:.0f} × | {one.bytes_per_second:.0f} | {one.batch_bytes_per_second:.0f} "
            f"| {one.batch_speedup:.1f} | {one.token_steps:.2f}, {one.batch_token_steps:.2f} "
            f"| {one.token_time:.2f}, {one.batch_token_time:.2f} |"
        )
        for cache in measure_caches(run, split, (1024, 8192, 65_536)):
            found[f"{name} after {cache.context} bytes"] = cache
            sizes = f"{cache.byte_level / 1024:.0f} KiB | {cache.token_level / 1024:.0f} KiB"
            kept.append(f"| `{name}` | {cache.context} | {sizes} | {cache.tokens} |")
    display.note("\n".join([*lines, "", *kept]) + "\n")
    return found


def bench_compilation(config: BenchConfig, target: str, display: Display) -> dict[str, StepReport]:
    """What a training step needs on a GPU that is not there. Raises `ConfigError`."""
    run = preset(config, config.estimator)
    ways: dict[str, Implementation | None] = {"kernels": None, "xla": "xla"}
    found = {}
    for name, way in ways.items():
        if config.implementation not in ("both", name):
            continue
        unet = dataclasses.replace(run.unet, compute=config.compute, implementation=way)
        display.note(f"compiling a step of {config.model} for {target}, {name}; minutes")
        found[name] = compile_elsewhere(dataclasses.replace(run, unet=unet), target)
        display.note(step_table(found[name], run.bytes_per_step))
    return found


def bench_overhead(config: BenchConfig, display: Display) -> dict[str, Overhead | Timing]:
    """What learning the boundaries costs. Raises `ConfigError` and `DataError`."""
    found: dict[str, Overhead | Timing] = {}
    lines = ["| preset | MFLOP a byte | policy | objective | early head | all |", "|---|---|---|---|---|---|"]
    for name in [name for name, run in PRESETS.items() if isinstance(run.unet, UNetConfig)]:
        one = overhead(preset(dataclasses.replace(config, model=name), "sfe"))
        shares = (one.policy, one.objective, one.early_head)
        percent = " | ".join(f"{part / one.prescribed:.3%}" for part in shares)
        lines.append(f"| `{name}` | {one.prescribed / 1e6:.2f} | {percent} | {one.share:.3%} |")
        found[name] = one
    display.note("\n".join(lines) + "\n")
    run = preset(config, "stride")
    display.note(f"compiling a training step of {config.model} with given boundaries and with learned ones")
    steps = of_estimators(run, ["stride", "sfe"], load_split(run))
    if steps.left_out:
        raise ConfigError("; ".join(f"{name}: {reason}" for name, reason in steps.left_out.items()))
    timings = in_turns(steps.works, baseline="stride", rounds=config.rounds, calls=config.calls)
    sfe = timings["sfe"]
    display.note(
        f"a step with learned boundaries takes {1 / sfe.speedup:.3f} times as long as one with given ones "
        f"({CONFIDENCE:.0%} interval of the median: {1 / sfe.high:.3f} to {1 / sfe.low:.3f})"
    )
    return {**found, f"seconds of {config.model}": timings["sfe"]}


def step_table(report: StepReport, bytes_per_step: int) -> str:
    """A compiled step, part by part, in Markdown."""
    total = sum(part.seconds for part in report.parts)
    lines = ["| part | kernels | GFLOP | GB moved | estimate, ms | share |", "|---|---|---|---|---|---|"]
    whole = Share(
        "all", *(sum(getattr(p, name) for p in report.parts) for name in ("kernels", "flops", "bytes", "seconds"))
    )
    for part in (*report.parts, whole):
        numbers = (
            f"{part.flops / 1e9:.1f} | {part.bytes / 1e9:.2f} | {part.seconds * 1e3:.3f} | {part.seconds / total:.0%}"
        )
        lines.append(f"| {part.part} | {part.kernels} | {numbers} |")
    notes = (
        f"{report.target}: {report.peak_bytes / 2**30:.2f} GiB at the peak, {report.state_bytes / 2**30:.2f} of it parameters "
        f"and moments; {bytes_per_step / total / 1e6:.1f} MB/s by the estimate; {report.pallas} kernels of this library"
        + (f"; {report.loops} loops, counted as one pass each" if report.loops else "")
        + f"; compiled in {report.compile_seconds:.0f} s."
    )
    return "\n".join([*lines, "", notes]) + "\n"


def preset(config: BenchConfig, estimator: EstimatorName) -> RunConfig:
    """The run whose step is looked at. Raises `ConfigError`."""
    run = PRESETS[config.model]
    shape = run.unet
    try:
        unet = dataclasses.replace(
            shape,
            early_share=shape.early_share if config.early_share is None else config.early_share,
            remat=shape.remat if config.remat is None else config.remat,
        )
    except ValueError as error:
        raise ConfigError(f"--early-share: {error}") from error
    return dataclasses.replace(
        run,
        unet=unet,
        estimator=estimator,
        dataset=config.dataset,
        rate=run.rate if config.rate is None else config.rate,
        batch=run.batch if config.batch is None else config.batch,
        length=run.length if config.length is None else config.length,
    )


def timing_table(timings: Mapping[str, Timing], what: str, bytes_per_call: int, baseline: str = "uniform") -> str:
    """Speeds and ratios in Markdown."""
    lines = [f"| {what} | kB/s | times the speed of `{baseline}`, {CONFIDENCE:.0%} interval |", "|---|---|---|"]
    for name, timing in timings.items():
        lines.append(
            f"| `{name}` | {bytes_per_call / timing.seconds / 1e3:.1f} | {'–' if name == baseline else timing.ratio} |"
        )
    return "\n".join([*lines, "", INTERVALS]) + "\n"


def bench(config: BenchConfig, display: Display) -> None:
    """Measure, say what was measured, and write it down where asked. Raises `ConfigError` and `DataError`."""
    if config.rounds < 1 or config.calls < 1:
        raise ConfigError("--rounds and --calls must be at least 1")
    asked = ("alternatives", "models", "ops", "rates", "recurrence", "writing", "overhead", "compile_for")
    given = [f"--{name.replace('_', '-')}" for name in asked if getattr(config, name)]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are measured one at a time")
    if config.compile_for is not None:
        what, found = "compiled", bench_compilation(config, config.compile_for, display)
    elif config.alternatives:
        what, found = "alternatives", bench_alternatives(config, display)
    elif config.models:
        what, found = "models", bench_models(config, display)
    elif config.rates:
        what, found = "rates", bench_rates(config, display)
    elif config.recurrence:
        what, found = "recurrence", bench_recurrence(config, display)
    elif config.writing:
        what, found = "writing", bench_writing(config, display)
    elif config.ops:
        what, found = "operations", bench_operations(config, display)
    elif config.overhead:
        what, found = "overhead", bench_overhead(config, display)
    else:
        what, found = "estimators", bench_estimators(config, display)
    if config.json is not None:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        plain = {name: dataclasses.asdict(one) for name, one in found.items()}
        write_atomically(config.json, json_text({"settings": dataclasses.asdict(config), what: plain}))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, or 2 for a user's error."""
    display = Display()
    given = sys.argv[1:] if arguments is None else list(arguments)

    def command() -> None:
        config = tyro.cli(BenchConfig, prog="python -m experiments.bench", args=given)
        # As those commands do that train and write.
        jax.config.update("jax_num_cpu_devices", 1 if config.writing else min(2, os.cpu_count() or 1))
        bench(config, display)

    return exit_code(display, command)


if __name__ == "__main__":
    with_large_pages("experiments.bench")
    sys.exit(main())
