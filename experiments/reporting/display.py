"""Terminal output of training: progress, validation results, and shaded held-out text at the end."""

from __future__ import annotations

import math
import sys
from typing import IO, cast

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from experiments.config.settings import RunConfig
from experiments.evaluation.evaluate import Validation
from experiments.terminal import Lenient, escaped, message
from unet.decoding.boundaries import coloured
from unet.shading.characters import Character


class Display:
    """A progress bar, one line per validation, and notes, all on standard error; nothing where that is gone."""

    def __init__(self, quiet: bool = False):
        errors = cast("IO[str]", Lenient(sys.stderr))
        self.console = Console(file=errors, stderr=True, quiet=quiet, highlight=False, emoji=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def note(self, text: str) -> None:
        """Print `text`, which may have several lines."""
        self.console.print(escaped(text, keep="\n\t"), markup=False)

    def error(self, text: str) -> None:
        """Print what went wrong, in one line of bounded length."""
        self.note(message(f"error: {text}"))

    def start(self, config: RunConfig, parameters: int, capacity: int, done: int) -> None:
        """Print a description of the run and start the progress bar at `done` steps."""
        self.note(
            f"{config.estimator} on {config.dataset}: {parameters:,} parameters, {config.total_steps:,} steps of "
            f"{config.batch} x {config.length} bytes, up to {capacity} tokens a sequence; files in {config.run_dir}"
        )
        if not done:
            self.note("compiling, up to a minute")
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        total = config.total_steps * config.bytes_per_step
        self._task = self._progress.add_task("training", total=total, completed=done * config.bytes_per_step, state="")
        self._progress.start()

    def progress(self, step: int, record: dict[str, float | int | None], bytes_per_second: float) -> None:
        """Update the progress bar."""
        if self._progress is None or self._task is None:
            return
        speed = "" if math.isnan(bytes_per_second) else f"  {bytes_per_second / 1e3:.1f} kB/s"
        state = f"{_megabytes(record['bytes'])} MB{speed}  bpb {record['bpb']:.3f}  rate {record['rate']:.3f}"
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

    def sample(self, characters: list[Character]) -> None:
        """Print held-out text with the boundary probability of each character as its background colour."""
        self.console.print("held-out text, boundary probability from blue (0) to red (1):")
        self.console.print(coloured(characters, marks=False))


def bits_per_byte(validation: Validation) -> str:
    """Bits per byte with the standard error over documents, if it is defined."""
    error = "" if math.isnan(validation.bpb_error) else f" ± {validation.bpb_error:.4f}"
    return f"{validation.bpb:.4f}{error}"


def _megabytes(num_bytes: float | int | None) -> str:
    return f"{np.nan if num_bytes is None else num_bytes / 1e6:.2f}"
