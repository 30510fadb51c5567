"""How fast everything is on this machine, as ratios to plain alternatives: `python -m experiments.bench steps`, and so on."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import tyro

from estimators.bounds import Count
from estimators.registry import BASELINE, DEFAULT, ESTIMATORS, REGULAR
from experiments.benchmark.exchange import exchange_table
from experiments.benchmark.generation import CacheReport, GenerationReport, measure_caches, measure_generation
from experiments.benchmark.gpu import Gpu
from experiments.benchmark.measurement import AbstractMeasurement, AbstractTimed, OfModel
from experiments.benchmark.models import ModelReport, measure
from experiments.benchmark.ops import Compared, Sizes, compare_operations
from experiments.benchmark.overhead import OverheadReport, overhead
from experiments.benchmark.pipeline import Data
from experiments.benchmark.rates import RateReport, token_level
from experiments.benchmark.recurrence import RecurrenceReport, recurrence
from experiments.benchmark.roofline import PartCost
from experiments.benchmark.steps import AlternativeName, alternative_step, estimator_steps, training_step
from experiments.benchmark.timing import Timing, time_interleaved
from experiments.benchmark.whole_step import StepReport, compile_in_subprocess
from experiments.command import exit_code
from experiments.comparison.intervals import ALIKE, CONFIDENCE
from experiments.config.arguments import PATHS, usage
from experiments.config.errors import ConfigError, require
from experiments.config.presets import PRESETS
from experiments.config.sections import MeshConfig
from experiments.devices import CPU_DEVICES, use_cpu_devices
from experiments.launch import program
from experiments.reporting.display import Display
from experiments.reporting.markdown import table
from experiments.training.data import load_split
from experiments.training.run_dir import json_text, make_folder, write_atomically
from unet.config import UNetConfig
from unet.ops import Implementation

INTERVALS = (
    f"In brackets: an interval that holds the median ratio over rounds with a confidence of {CONFIDENCE:.0%}, which takes 6 "
    f"rounds; {ALIKE} not distinguishable: it contains 1, or there is none."
)


@dataclass(frozen=True, kw_only=True)
class Steps(OfModel, AbstractTimed):
    """The training step of every estimator, against that of uniform boundaries."""

    estimators: tuple[str, ...] = tuple(ESTIMATORS.house)
    """Estimators to time."""

    def measure(self, display: Display) -> dict[str, Timing]:
        run = self.run(BASELINE)
        names = [BASELINE, *(name for name in self.estimators if name != BASELINE)]
        display.note(f"compiling a training step of {self.model} for {len(names)} estimators")
        steps = estimator_steps(run, names, load_split(run))
        for name, reason in steps.left_out.items():
            display.note(f"{name} is left out: {reason}")
        timings = time_interleaved(steps.works, baseline=BASELINE, rounds=self.rounds, calls=self.calls)
        display.note(timing_table(timings, "estimator", run.bytes_per_step))
        return timings


@dataclass(frozen=True, kw_only=True)
class Alternatives(OfModel, AbstractTimed):
    """The training step of --estimator sfe against plainer forms of it, PyTorch among them where it is installed."""

    against: tuple[AlternativeName, ...] = ("padded", "square", "pytorch", "pytorch-at-once")
    """A padded token level, attention over masked squares, eager PyTorch drawing byte by byte or at once. One that needs much
    memory slows down those after it, so that long sequences are best measured against one at a time."""

    def measure(self, display: Display) -> dict[str, Timing]:
        run = self.run(DEFAULT)
        split = load_split(run)
        display.note(f"a training step of {self.model}, {run.batch} x {run.length} bytes, against others; minutes")
        own, found = training_step(run, split), {}
        for name in self.against:
            try:
                other = alternative_step(name, run, split)
            except ConfigError as lack:
                display.note(str(lack))
                continue
            pair = time_interleaved(
                {"caesura": own, name: other}, baseline="caesura", rounds=self.rounds, calls=self.calls
            )
            display.note(timing_table(pair, "training step", run.bytes_per_step, baseline="caesura"))
            found[name] = pair[name]
        return found


@dataclass(frozen=True, kw_only=True)
class Rates(OfModel, AbstractTimed):
    """How the time of the token level follows the rate of boundaries."""

    def measure(self, display: Display) -> dict[str, RateReport]:
        run = self.run(REGULAR)
        display.note(
            f"the token level of {self.model}, {run.batch} x {run.length} bytes, forward and backward; minutes"
        )
        found = token_level(run, rounds=self.rounds, calls=self.calls)
        rows = [(name, f"{one.seconds * 1e3:.0f}", f"{one.per_token:.2f}") for name, one in found.items()]
        display.note(table(["rate", "ms", "per token, relative to a rate of 0.5"], rows))
        return found


@dataclass(frozen=True, kw_only=True)
class Recurrence(AbstractTimed):
    """The recurrence of a Mamba-2 layer of width 512 at several lengths, and against a plain scan."""

    def measure(self, display: Display) -> dict[str, RecurrenceReport]:
        display.note("the recurrence of a Mamba-2 layer of width 512, states of 128, forward and backward; a minute")
        found = recurrence(512, 128, rounds=self.rounds, calls=self.calls)
        rows = []
        for name, one in found.items():
            scan = "" if one.times_a_scan is None else f"{one.times_a_scan:.1f}"
            rows.append((name, f"{one.seconds * 1e3:.0f}", f"{one.per_position:.2f}", scan))
        head = ["positions", "ms", "a position, relative to the first", "times the speed of a plain scan"]
        display.note(table(head, rows))
        return found


@dataclass(frozen=True, kw_only=True)
class Ops(AbstractTimed):
    """Every ragged operation against a plain form of it, and dynamic chunking against the package h-net-dynamic-chunking where
    that is installed."""

    def measure(self, display: Display) -> dict[str, Compared]:
        sizes = Sizes()
        what = f"{sizes.batch} x {sizes.length} positions of {sizes.dim}, {sizes.rate:.2f} boundaries a position"
        display.note(f"operations on {what}, with their gradients where they have one")
        found = compare_operations(sizes, rounds=self.rounds, calls=self.calls)
        rows = [(name, f"{one.own.seconds * 1e3:.1f}", one.other, one.own.ratio) for name, one in found.items()]
        head = ["operation", "ms", "instead of", f"times its speed, {CONFIDENCE:.0%} interval"]
        display.note(f"{table(head, rows)}\n{INTERVALS}\n")
        return found


@dataclass(frozen=True, kw_only=True)
class Models(OfModel, AbstractTimed):
    """What whole models take to compile, in memory, to train and to evaluate."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ("tiny",)
    """Presets to measure."""
    estimator: str = DEFAULT
    """Their estimator."""

    def measure(self, display: Display) -> dict[str, ModelReport]:
        found, rows = {}, []
        for name in self.models:
            run = self.run(self.estimator, name)
            display.note(f"measuring {name}, {run.batch} x {run.length} bytes")
            one = found[name] = measure(run, load_split(run), rounds=self.rounds, calls=self.calls)
            size = f"{one.parameters / 1e6:.1f} M", f"{run.batch} × {run.length}", f"{one.compile_seconds:.0f} s"
            speed = f"{one.training / 1e3:.1f} kB/s", f"{one.evaluation / 1e3:.1f} kB/s"
            rows.append((f"`{name}`", *size, f"{one.peak_bytes / 2**30:.2f} GiB", *speed))
        display.note(table(["preset", "parameters", "batch", "to compile", "memory", "training", "evaluation"], rows))
        return found


@dataclass(frozen=True, kw_only=True)
class Generation(OfModel, AbstractTimed):
    """What it takes to generate byte by byte, alone and in a batch, against a forward pass over the whole text for each byte; and
    what the caches hold."""

    cpu_devices: ClassVar[int] = CPU_DEVICES
    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ("tiny",)
    """Presets to measure."""
    estimator: str = DEFAULT
    """Their estimator."""

    def measure(self, display: Display) -> dict[str, GenerationReport | CacheReport]:
        found: dict[str, GenerationReport | CacheReport] = {}
        rows, kept = [], []
        for name in self.models:
            run = self.run(self.estimator, name)
            split = load_split(run)
            display.note(f"generating with {name}; minutes")
            one = found[name] = measure_generation(run, split, rounds=self.rounds)
            speeds = f"{one.speedup:.0f} ×", f"{one.bytes_per_second:.0f}", f"{one.batch_bytes_per_second:.0f}"
            steps = f"{one.token_steps:.2f}, {one.batch_token_steps:.2f}"
            times = f"{one.token_time:.2f}, {one.batch_token_time:.2f}"
            rows.append((f"`{name}`", *speeds, f"{one.batch_speedup:.1f}", steps, times))
            for cache in measure_caches(run, split, (1024, 8192, 65_536)):
                found[f"{name} after {cache.context} bytes"] = cache
                sizes = f"{cache.byte_level / 1024:.0f} KiB", f"{cache.token_level / 1024:.0f} KiB"
                kept.append((f"`{name}`", cache.context, *sizes, cache.tokens))
        speed = "a byte, against a pass", "bytes/s", "in a batch of 16", "ratio"
        head = ["preset", *speed, "steps with the token level", "share of time"]
        caches = table(["preset", "context", "kept at the byte level", "at the token level", "tokens"], kept)
        display.note(f"{table(head, rows)}\n{caches}")
        return found


@dataclass(frozen=True, kw_only=True)
class Compile(OfModel, AbstractMeasurement):
    """Times nothing: compiles a training step for a GPU that need not be there, and says what it needs."""

    target: Annotated[Literal["a100", "h100", "b200"], tyro.conf.Positional]
    """The GPU."""
    estimator: str = DEFAULT
    """Estimator of the step."""
    compute: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the matrix products."""
    implementation: Literal["both", "kernels", "xla"] = "both"
    """Compile with the kernels, without them, or once each."""
    devices: Count = 1
    """GPUs of one host that share the step."""
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def measure(self, display: Display) -> dict[str, StepReport]:
        run = self.run(self.estimator)
        implementations: dict[str, Implementation | None] = {"kernels": None, "xla": "xla"}
        found = {}
        for name, implementation in implementations.items():
            if self.implementation not in ("both", name):
                continue
            unet = dataclasses.replace(run.unet, compute=self.compute, implementation=implementation)
            display.note(f"compiling a step of {self.model} for {self.target}, {name}; minutes")
            shared = dataclasses.replace(run, unet=unet, devices=self.devices, mesh=self.mesh)
            found[name] = compile_in_subprocess(shared, self.target)
            display.note(step_table(found[name], run.bytes_per_step))
        return found


@dataclass(frozen=True, kw_only=True)
class Overhead(OfModel, AbstractTimed):
    """What the score function adds to a step whose boundaries are given, in operations for every preset of transformer blocks
    and in time for --model."""

    def measure(self, display: Display) -> dict[str, OverheadReport | Timing]:
        found: dict[str, OverheadReport | Timing] = {}
        rows = []
        for name in [name for name, run in PRESETS.items() if isinstance(run.unet, UNetConfig)]:
            one = found[name] = overhead(self.run(DEFAULT, name))
            parts = (one.policy, one.objective, one.early_head)
            shares = [f"{part / one.prescribed:.3%}" for part in parts]
            rows.append((f"`{name}`", f"{one.prescribed / 1e6:.2f}", *shares, f"{one.share:.3%}"))
        display.note(table(["preset", "MFLOP a byte", "policy", "objective", "early head", "all"], rows))
        run = self.run(REGULAR)
        display.note(f"compiling a training step of {self.model} with given boundaries and with learned ones")
        steps = estimator_steps(run, [REGULAR, DEFAULT], load_split(run))
        if steps.left_out:
            raise ConfigError("; ".join(f"{name}: {reason}" for name, reason in steps.left_out.items()))
        sfe = time_interleaved(steps.works, baseline=REGULAR, rounds=self.rounds, calls=self.calls)[DEFAULT]
        display.note(
            f"a step with learned boundaries takes {1 / sfe.speedup:.3f} times as long as one with given ones "
            f"({CONFIDENCE:.0%} interval of the median: {1 / sfe.high:.3f} to {1 / sfe.low:.3f})"
        )
        return {**found, f"seconds of {self.model}": sfe}


Command = Steps | Alternatives | Models | Generation | Ops | Rates | Recurrence | Overhead | Compile | Data | Gpu
"""Each is a subcommand of the name of its class."""


def step_table(report: StepReport, bytes_per_step: int) -> str:
    """A compiled step, part by part, in Markdown."""
    total = sum(part.seconds for part in report.parts)
    sums = (sum(getattr(p, name) for p in report.parts) for name in ("kernels", "flops", "bytes", "seconds"))
    rows = []
    for part in (*report.parts, PartCost("all", *sums)):
        work = f"{part.flops / 1e9:.1f}", f"{part.bytes / 1e9:.2f}", f"{part.seconds * 1e3:.3f}"
        rows.append((part.part, part.kernels, *work, f"{part.seconds / total:.0%}"))
    notes = (
        f"{report.target}: {report.peak_bytes / 2**30:.2f} GiB at the peak, {report.state_bytes / 2**30:.2f} of it parameters "
        f"and moments; {bytes_per_step / total / 1e6:.1f} MB/s by the estimate; {report.pallas} kernels of this library"
        + (f"; {report.loops} loops, counted as one pass each" if report.loops else "")
        + f"; compiled in {report.compile_seconds:.0f} s"
        + (f"; {report.memory}." if report.memory else ".")
    )
    parts = table(["part", "kernels", "GFLOP", "GB moved", "estimate, ms", "share"], rows)
    return f"{parts}\n{notes}\n{exchange_table(report, total)}"


def timing_table(timings: Mapping[str, Timing], what: str, bytes_per_call: int, baseline: str = BASELINE) -> str:
    """Speeds and ratios in Markdown."""
    rows = [
        (f"`{name}`", f"{bytes_per_call / one.seconds / 1e3:.1f}", "–" if name == baseline else one.ratio)
        for name, one in timings.items()
    ]
    head = [what, "kB/s", f"times the speed of `{baseline}`, {CONFIDENCE:.0%} interval"]
    return f"{table(head, rows)}\n{INTERVALS}\n"


def bench(config: AbstractMeasurement, display: Display) -> None:
    """Measure, and write it down where asked. Raises `ConfigError` and `DataError`."""
    if config.json is not None:
        make_folder(config.json.parent, "--json in")
        require(not config.json.is_dir(), f"--json {config.json} is a folder; name a file")
    if not isinstance(config, Gpu):
        # Its parts have processes of their own, which have the GPU to themselves.
        use_cpu_devices(config.cpu_devices)
    found = config.measure(display)
    if config.json is not None:
        name = type(config).__name__.lower()
        content = {
            "settings": dataclasses.asdict(config),
            name: found,
        }
        write_atomically(config.json, json_text(content))


def parse(arguments: Sequence[str]) -> AbstractMeasurement:
    """The measurement that a command line asks for. Prints help or a usage error and raises `SystemExit` (2 for an error)."""
    with usage(arguments):
        return tyro.cli(Command, prog="python -m experiments.bench", args=list(arguments), registry=PATHS)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    display = Display()
    given = sys.argv[1:] if arguments is None else list(arguments)
    return exit_code(display, lambda: bench(parse(given), display))


if __name__ == "__main__":
    program(main)
