"""Terminal output of training: progress, validation results, and shaded held-out text at the end."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import IO, cast

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn

from experiments.config.settings import RunConfig
from experiments.evaluation.evaluate import Validation
from experiments.terminal import Lenient, escaped, message
from unet.decoding.boundaries import coloured
from unet.shading.characters import Character, visible

Record = dict[str, float | int | None]


class Display:
    """A progress bar, or lines of progress where there is no terminal, one line per validation, and notes, all on standard error;
    nothing where that is gone. A `quiet` one shows errors alone, which begin with `prefix`."""

    def __init__(self, quiet: bool = False):
        errors = cast("IO[str]", Lenient(sys.stderr))
        self.console = Console(file=errors, stderr=True, highlight=False, emoji=False, soft_wrap=True)
        self.quiet, self.prefix, self.muted = quiet, "", False
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._lines: ProgressLines | None = None

    def note(self, text: str) -> None:
        """Print `text`, which may have several lines."""
        if not self.quiet:
            self._print(text)

    def error(self, text: str) -> None:
        """Print what went wrong, in one line of bounded length, unless this is `muted`."""
        if not self.muted:
            self._print(message(f"{self.prefix}error: {text}"))

    def _print(self, text: str) -> None:
        self.console.print(escaped(text, keep="\n\t"), markup=False)

    def start(self, config: RunConfig, parameters: int, capacity: int, done: int) -> None:
        """Print a description of the run and start showing progress, at `done` steps."""
        self.note(
            f"{config.estimator} on {config.dataset}: {parameters:,} parameters, {config.total_steps:,} steps of "
            f"{config.batch} x {config.length} bytes, up to {capacity} tokens a sequence; files in {config.run_dir}"
        )
        if not done:
            self.note("compiling, up to a minute")
        total = config.total_steps * config.bytes_per_step
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            self._lines = ProgressLines(config.total_steps, total, config.log_seconds)
        elif not self.quiet:
            self._progress = Progress(*_columns(self.console.width), console=self.console)
            self._task = self._progress.add_task(
                "training", total=total, completed=done * config.bytes_per_step, state=""
            )
            self._progress.start()

    def progress(self, step: int, record: Record, bytes_per_second: float) -> None:
        """Show how far the run is."""
        if self._lines is not None and (line := self._lines.after(step, record, bytes_per_second)):
            self.note(line)
        if self._progress is not None and self._task is not None:
            state = _state(record, bytes_per_second, self.console.width)
            self._progress.update(self._task, completed=record["bytes"] or 0, state=state)

    def validation(self, step: int, validation: Validation) -> None:
        """Print validation results in one line."""
        agreement = validation.whitespace
        early = "" if math.isnan(validation.early_bpb) else f" (early exit {validation.early_bpb:.4f})"
        if not math.isnan(validation.bpb_as_trained):
            early += (
                f" with its own boundaries, sampled; {validation.bpb_greedy:.4f} greedy; {validation.bpb_as_trained:.4f} with "
                "those it is trained on"
            )
        inner = "".join(f" / {rate:.3f}" for rate in validation.inner_rates)
        # The AUC is undefined if the text has no white space or the model has no boundaries.
        agreement_text = (
            ""
            if math.isnan(agreement.auc)
            else f", agreement with white space: AUC {agreement.auc:.3f}, F1 {agreement.f1:.3f} greedy, "
            f"{agreement.sampled_f1:.3f} sampled"
        )
        self.note(
            f"step {step}: held-out bpb {bits_per_byte(validation)}{early}, rate {validation.rate:.3f}{inner}{agreement_text}"
        )

    def stop(self) -> None:
        """Remove the progress bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def sample(self, texts: Sequence[Sequence[Character]]) -> None:
        """Print held-out texts with the boundary probability of each character as its background colour."""
        if self.quiet:
            return
        if self.console.color_system is None or self.console.no_color:
            marked = ("".join(visible(one.text) + one.mark for one in text) for text in texts)
            self.note("held-out text, with a mark behind each sampled boundary:\n" + "\n\n".join(marked))
            return
        self.console.print("held-out text, boundary probability from blue (0) to red (1):")
        for text in texts:
            self.console.print()
            self.console.print(coloured(text, marks=False))


class ProgressLines:
    """Lines of progress, at most one in so many `seconds`."""

    def __init__(self, steps: int, num_bytes: int, seconds: float):
        """`steps`, `num_bytes`: of the whole run."""
        self._steps, self._bytes, self._seconds = steps, num_bytes, seconds
        self._last = time.monotonic()

    def after(self, step: int, record: Record, bytes_per_second: float) -> str:
        """The line after a step; empty where none is due."""
        now = time.monotonic()
        if now - self._last < self._seconds:
            return ""
        self._last, done = now, record["bytes"] or 0
        parts = [
            f"step {step} of {self._steps}",
            f"{_megabytes(done)} of {_megabytes(self._bytes)} MB",
            f"bpb {_digits(record['bpb'])}",
            f"rate {_digits(record['rate'])}",
        ]
        if not math.isnan(bytes_per_second):
            parts += [f"{bytes_per_second / 1e3:.1f} kB/s", f"{duration((self._bytes - done) / bytes_per_second)} left"]
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """A time in the two largest of its units, such as 2 h 05 min."""
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24:02d} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def _columns(width: int) -> list[ProgressColumn]:
    """What a progress bar shows on a terminal so many characters wide."""
    columns: list[ProgressColumn] = [TextColumn("{task.fields[state]}"), TimeRemainingColumn()]
    if width >= 66:
        columns.insert(0, BarColumn(bar_width=min(20, width - 56)))
    return [TextColumn("{task.description}"), *columns] if width >= 84 else columns


def _state(record: Record, bytes_per_second: float, width: int) -> str:
    """What stands beside the bar, as much of it as there is room for."""
    speed = "" if math.isnan(bytes_per_second) else f"  {bytes_per_second / 1e3:.1f} kB/s"
    done, bpb, rate = f"{_megabytes(record['bytes'])} MB", _digits(record["bpb"]), _digits(record["rate"])
    if width >= 56:
        return f"{done}{speed}  bpb {bpb}  rate {rate}"
    return f"{done}  bpb {bpb}" if width >= 34 else f"bpb {bpb}"


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def bits_per_byte(validation: Validation) -> str:
    """Bits per byte with the standard error over documents, if it is defined."""
    error = "" if math.isnan(validation.bpb_error) else f" ± {validation.bpb_error:.4f}"
    return f"{validation.bpb:.4f}{error}"


def _megabytes(num_bytes: float | int | None) -> str:
    return f"{np.nan if num_bytes is None else num_bytes / 1e6:.2f}"
