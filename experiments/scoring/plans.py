"""How models are scored, from what a command says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from experiments.config.errors import ConfigError, require
from experiments.config.settings import RunConfig
from experiments.scoring.models import OpenModel
from experiments.scoring.score import BoundaryChoice, Plan

CONTEXT = 4096
"""Bytes of a window where no run says how long its sequences were."""


@runtime_checkable
class PlanSettings(Protocol):
    """The settings that make a plan; None for what nobody has set."""

    @property
    def context(self) -> int | None: ...

    @property
    def stride(self) -> int | None: ...

    @property
    def boundaries(self) -> BoundaryChoice | None: ...

    @property
    def samples(self) -> int | None: ...

    @property
    def seed(self) -> int: ...


def plan_of(settings: PlanSettings, models: Sequence[OpenModel], default: BoundaryChoice) -> Plan:
    """Windows as long as the shortest sequences of the runs, half as far apart, unless the settings say otherwise; boundaries as
    the settings say, drawn where they ask for samples, else as `default`.

    Raises `ConfigError` for what cannot be, and for boundaries of models that have none.
    """
    context = settings.context or context_of(one.config for one in models)
    stride = settings.stride or max(1, context // 2)
    require(stride <= context, f"--stride {stride} is more than --context {context}: windows would leave bytes out")
    boundaries = settings.boundaries or ("drawn" if settings.samples is not None else default)
    samples = settings.samples or 1
    require(boundaries == "drawn" or samples == 1, "--samples draws boundaries: leave out --boundaries greedy")
    if all(not one.levels for one in models):
        require_levels(models, {"--boundaries": settings.boundaries == "greedy", "--samples": samples > 1})
    return Plan(context, stride, boundaries, samples, settings.seed)


def context_of(configs: Iterable[RunConfig | None]) -> int:
    """The bytes of a window where none are asked for: the shortest sequences that a model was trained on, by the settings of
    their runs (None: unknown)."""
    return min((one.length for one in configs if one is not None), default=CONTEXT)


def require_levels(models: Sequence[OpenModel], asked: dict[str, bool]) -> None:
    """Raise `ConfigError` where a flag that is `asked` needs boundaries that a model does not have."""
    without = [one.name for one in models if not one.levels]
    flags = [flag for flag, is_asked in asked.items() if is_asked]
    if without and flags:
        raise ConfigError(
            f"{without[0]} has no level of tokens and so no boundaries: leave out {', '.join(flags)}, or this model"
        )
