"""From what a run does to what its trackers are told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from data import Split
from experiments.config.errors import one_line
from experiments.config.files import to_json
from experiments.config.settings import RunConfig
from experiments.evaluation.byte_results import LocalPass
from experiments.evaluation.evaluate import PROBABILITY_BINS
from experiments.reporting.pictures import boundaries_picture
from experiments.reporting.shading import readable, shade
from experiments.tracking.tracker import Tracker, open_tracker
from experiments.training.records import Record
from unet.language_model import AbstractLanguageModel
from unet.shading.html import fragment, page

TEXT_ROWS = 3


class Trackers:
    """The trackers of a run, which are told of steps and validations. One that fails is left out from there on, with a note."""

    def __init__(self, config: RunConfig, run_dir: Path, split: Split, step: int, note: Callable[[str], None]):
        """`step`: steps that are done."""
        self._rows = split.held_out_rows(TEXT_ROWS * max(config.length, 1))[:TEXT_ROWS] if config.tracker else []
        self._seed, self._note = config.seed, note
        self._open: dict[str, Tracker] = {}
        plain = json.loads(to_json(config))
        for name in config.tracker:
            opened = self._tried(name, lambda name=name: open_tracker(name, run_dir, plain, step))
            if isinstance(opened, Tracker):
                self._open[name] = opened

    def on_step(self, step: int, record: Record) -> None:
        """Tell of a training step."""
        values = numbers(record)
        self._tell(lambda tracker: tracker.scalars(step, values))

    def on_validation(self, step: int, record: Record, model: Callable[[], AbstractLanguageModel]) -> None:
        """Tell of a validation: its numbers, how probable boundaries are, and a text shaded by it."""
        if not self._open:
            return
        values, shares = numbers(record), probabilities(record)
        self._tell(lambda tracker: tracker.scalars(step, values))
        if not shares:
            return
        edges = [number / len(shares) for number in range(len(shares) + 1)]
        self._tell(lambda tracker: tracker.histogram(step, "val_probability", edges, shares))
        shaded = [readable(text) for text in shade(LocalPass(model()), self._rows, seed=self._seed)]
        notes = [f"Text {number}" for number in range(1, len(shaded) + 1)]
        written, png = page(f"Step {step}", fragment(shaded, notes)), boundaries_picture(shaded)
        self._tell(lambda tracker: tracker.html(step, "held_out_text", written))
        self._tell(lambda tracker: tracker.picture(step, "boundaries", png))

    def close(self) -> None:
        """Tell of the end."""
        self._tell(lambda tracker: tracker.close())
        self._open.clear()

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            if self._tried(name, lambda tracker=tracker: what(tracker)) is _FAILED:
                del self._open[name]

    def _tried(self, name: str, what: Callable[[], object]) -> object:
        """The result; what fails in somebody else's service is worth no training."""
        try:
            return what()
        except Exception as error:
            reason = one_line(" ".join(f"{type(error).__name__}: {error}".split()), 200)
            self._note(f"--tracker {name} failed and is left out from here on ({reason}); metrics.jsonl goes on")
            return _FAILED


_FAILED = object()


def numbers(record: Mapping[str, float | int | str | None]) -> dict[str, float]:
    """The finite numbers of a record, without the step."""
    return {
        name: float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def probabilities(record: Mapping[str, float | int | str | None]) -> Sequence[float]:
    """The shares `val_probability_…` of a validation; empty without boundaries."""
    found = [record.get(f"val_probability_{number}") for number in range(PROBABILITY_BINS)]
    return [float(value) for value in found if isinstance(value, int | float)]
