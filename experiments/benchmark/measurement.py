"""What every measurement of `experiments.bench` has."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from estimators.bounds import MARGIN, Count, Length, Rate, Sequences, Within
from experiments.config.errors import require, require_bounds
from experiments.config.presets import PRESETS
from experiments.config.settings import RunConfig
from experiments.reporting.display import Display


@dataclass(frozen=True, kw_only=True)
class AbstractMeasurement(ABC):
    """What every measurement has."""

    cpu_devices: ClassVar[int] = 2
    """Parts of a CPU that share the work, at most, as in the command that is measured."""
    json: Path | None = None
    """Also write what was measured to this file."""

    @abstractmethod
    def measure(self, display: Display) -> Mapping[str, object]:
        """Measure and show it; returns dataclasses by name. Raises `ConfigError` and `DataError`."""


@dataclass(frozen=True, kw_only=True)
class AbstractTimed(AbstractMeasurement):
    """A measurement of times, in turns."""

    rounds: Annotated[int, Within(1, 10_000)] = 7
    """Times that every alternative is measured, in turns; medians are reported, from 6 on with their intervals."""
    calls: Count = 5
    """Calls that each measurement takes together."""

    def __post_init__(self):
        require_bounds(self)


@dataclass(frozen=True, kw_only=True)
class OfModel:
    """The run that is measured: its preset, and what is changed in it."""

    dataset: str = "docs"
    """Text to work on: anything that --dataset of experiments.run takes."""
    model: str = "tiny"
    """Preset of the model."""
    rate: Rate | None = None
    """Target rate, instead of the preset's."""
    early_exit_fraction: Annotated[float, Within(MARGIN, 1.0)] | None = None
    """Share of positions at which the early head predicts, instead of the preset's."""
    batch: Sequences | None = None
    """Sequences per step, instead of the preset's."""
    length: Length | None = None
    """Bytes per sequence, instead of the preset's."""
    remat: bool | None = None
    """Recompute blocks in the backward pass, instead of what the preset says."""

    def __post_init__(self):
        require_bounds(self)

    def run(self, estimator: str, model: str | None = None) -> RunConfig:
        """The run that is measured, of another preset where one is named. Raises `ConfigError`."""
        name = self.model if model is None else model
        require(name in PRESETS, f"--model {name} is none of {', '.join(PRESETS)}")
        run = PRESETS[name]
        shape = run.unet
        unet = dataclasses.replace(
            shape,
            early_exit_fraction=shape.early_exit_fraction
            if self.early_exit_fraction is None
            else self.early_exit_fraction,
            remat=shape.remat if self.remat is None else self.remat,
        )
        return dataclasses.replace(
            run,
            unet=unet,
            estimator=estimator,
            dataset=self.dataset,
            rate=run.rate if self.rate is None else self.rate,
            batch=run.batch if self.batch is None else self.batch,
            length=run.length if self.length is None else self.length,
        )
