"""Runs as their folders show them, read without any of the classes that they are made of."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments.config.errors import ConfigError, one_line
from experiments.config.structure import Flat, parsed
from experiments.training.metrics_log import undamaged_metrics
from experiments.training.run_dir import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    OF_NO_EFFECT,
    SUMMARY,
    at_work,
    has_checkpoint,
    read_summary,
)

LONGEST_VALUE = 40


@dataclass(frozen=True)
class ListedRun:
    """A run: its name, its state in words, how far it is, its latest held-out bits per byte and rate, its settings as text by the
    names of their flags, and its validations as (training megabytes, bits per byte)."""

    name: str
    state: str
    progress: str = "–"
    bpb: float | None = None
    rate: float | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    curve: Sequence[tuple[float, float]] = ()


def find_runs(folder: Path) -> Iterator[ListedRun]:
    """The runs in a folder, at any depth, by name; of a run itself that one. Raises `ConfigError` where it is no folder."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder")
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(place)
        if CONFIG in files and (run := read_run(here, folder)) is not None:
            folders.clear()
            yield run


def read_run(folder: Path, within: Path) -> ListedRun | None:
    """The run in `folder`, called as it is from `within`; None where the configuration there is no run's."""
    name = str(folder.relative_to(within)) if folder != within else folder.resolve().name
    try:
        values = parsed((folder / CONFIG).read_bytes())
        if not isinstance(values, dict) or not {"estimator", "dataset", "model"} <= values.keys():
            return None
        records, _ = undamaged_metrics(folder)
        summary = read_summary(folder) if (folder / SUMMARY).is_file() else None
    except (OSError, ValueError, ConfigError) as error:
        trained = (folder / METRICS).exists() or (folder / CHECKPOINTS).exists()
        return ListedRun(name, f"damaged: {one_line(str(error), 80)}") if trained else None
    latest: Flat = {}
    for record in records:
        latest |= {key: record[key] for key in ("step", "val_bpb", "val_rate") if record.get(key) is not None}
    latest |= summary or {}
    if summary is not None:
        latest["step"] = summary.get("steps")
    step = latest.get("step") or 0
    points = [(record["bytes"], record.get("val_bpb")) for record in records]
    return ListedRun(
        name,
        _state(folder, finished=summary is not None, begun=bool(records)),
        _progress(step, _total(values)),
        _float(latest.get("val_bpb")),
        _float(latest.get("val_rate")),
        settings_of(values),
        [(x / 1e6, y) for x, y in points if isinstance(x, int | float) and isinstance(y, float)],
    )


def settings_of(values: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Settings of a configuration as text, by the names of their flags, without those of no effect."""
    found = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= settings_of(value, "" if name == "settings" and not prefix else f"{prefix}{name}.")
        elif prefix or name not in OF_NO_EFFECT:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            found[f"{prefix}{name}".replace("_", "-")] = one_line(text, LONGEST_VALUE)
    return found


def differing_settings(runs: Sequence[ListedRun]) -> list[str]:
    """The settings that some of the runs have differently; not those that others merely lack, as of other estimators."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if len({run.settings[name] for run in runs if name in run.settings}) > 1]


def _state(folder: Path, finished: bool, begun: bool) -> str:
    if at_work(folder):
        return "running"
    if finished:
        return "finished"
    return "stopped" if begun or has_checkpoint(folder) else "not begun"


def _progress(step: float | int | str, total: int | None) -> str:
    if total is None or not isinstance(step, int | float):
        return "–"
    return f"{step} of {total} ({min(step / total, 1.0):.0%})"


def _total(values: Mapping[str, object]) -> int | None:
    """The steps of the whole run; None where the file does not say."""
    steps, num_bytes, batch, length = (values.get(name) for name in ("steps", "bytes", "batch", "length"))
    if isinstance(steps, int) and steps > 0:
        return steps
    if not (isinstance(num_bytes, int) and isinstance(batch, int) and isinstance(length, int)) or batch * length <= 0:
        return None
    return num_bytes // (batch * length) or None


def _float(value: float | int | str | None) -> float | None:
    return float(value) if isinstance(value, int | float) else None
