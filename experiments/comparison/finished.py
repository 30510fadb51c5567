"""Finished runs, read from their folders or from the `table.json` of another comparison."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from data.fixed import without_place
from experiments.comparison.pairs import Curve
from experiments.config.errors import ConfigError
from experiments.config.files import from_values, to_json
from experiments.config.plugins import load_model, modules_of, trusted
from experiments.config.settings import RunConfig
from experiments.config.structure import Flat, flat, parsed
from experiments.reporting.summary import Summary
from experiments.training.metrics_log import read_metrics
from experiments.training.run_dir import OF_DEVICES, SUMMARY, differing, read_config, read_summary, with_any_lanes
from unet.flops import matrix_flops
from unet.losses import level_prefix


@dataclass(frozen=True)
class FinishedRun:
    """A run's settings, its `summary.json` and its validation curve. `folder`: None if the run comes from a table."""

    config: RunConfig
    summary: Summary
    curve: Curve
    folder: Path | None = None

    @property
    def seed(self) -> int:
        return self.config.seed

    def value(self, key: str) -> float:
        """A number in the summary; NaN if it is missing or not a number."""
        value = self.summary.get(key)
        return float(value) if isinstance(value, int | float) else math.nan

    def json(self) -> dict[str, object]:
        """The entry in `table.json`."""
        points = [
            {"flops": flops, "bytes": round(1e6 * megabytes), "val_bpb": bpb} for flops, megabytes, bpb in self.curve
        ]
        config = json.loads(to_json(self.config))
        return {"seed": self.seed, "config": config, "summary": self.summary, "curve": points}


Runs = Mapping[str, Sequence[FinishedRun]]
"""Finished runs by variant, sorted by seed."""
Key = tuple[str, int]
"""A variant and a seed."""


def is_finished(folder: Path) -> bool:
    """Whether the folder has a finished run."""
    return (folder / SUMMARY).is_file()


def read_finished(folder: Path, plugins: Collection[str] = ()) -> FinishedRun:
    """The finished run in a folder; `plugins` are modules that it may name."""
    config = read_config(folder, plugins)
    return FinishedRun(config, read_summary(folder), curve(folder, config), folder)


def read_tables(paths: Sequence[Path], requested: Mapping[Key, RunConfig]) -> dict[Key, FinishedRun]:
    """Those of the `requested` runs that are in the `table.json` files at `paths`, by variant and seed.

    Raises `ConfigError` if a file is not such a table, or if a run in it has the name of a variant and a seed of it but other
    settings.
    """
    plugins = {module for run in requested.values() for module in trusted(run)}
    read: dict[Key, FinishedRun] = {}
    for path in paths:
        for name, run in _read_table(path, plugins):
            key = name, run.seed
            if key not in requested or key in read:
                continue
            # The number of devices changes a run only by rounding errors.
            if changed := differing(portable(run.config), portable(requested[key]), may_differ=OF_DEVICES):
                raise ConfigError(
                    f"{path} has {name} of seed {run.seed} with other settings for {', '.join(changed)}: leave out the "
                    "table, or use its settings"
                )
            read[key] = run
    return read


def read_joined(name: str, folders: Sequence[Path], plugins: Collection[str]) -> dict[Key, FinishedRun]:
    """The finished runs in `folders`, made by any command, as those of the variant `name`.

    Raises `ConfigError` for a folder without one, for two runs of one seed, and for runs that differ in more than the seed.
    """
    read: dict[Key, FinishedRun] = {}
    for folder in folders:
        if not is_finished(folder):
            raise ConfigError(f"{folder} holds no finished run: there is no {SUMMARY} in it")
        run = read_finished(folder, plugins)
        if (name, run.seed) in read:
            raise ConfigError(
                f"{folder} and {read[name, run.seed].folder} are both of seed {run.seed}: name one of them"
            )
        first = next(iter(read.values()), run)
        if changed := differing(portable(run.config), portable(first.config), may_differ=(*OF_DEVICES, "seed")):
            raise ConfigError(
                f"{folder} and {first.folder} would be seeds of one variant {name}, but have other settings for "
                f"{', '.join(changed)}: give them names (--runs NAME={folder})"
            )
        read[name, run.seed] = run
    return read


def portable(run: RunConfig) -> RunConfig:
    """The settings without what depends on the place where a run is done: where the file of a published text lies, the path of
    another run whose model it reads, and lanes, which differ with the number of processes."""
    run = dataclasses.replace(with_any_lanes(run), dataset=without_place(run.dataset))
    needs = run.first.prerequisite
    return run if needs is None else run.with_settings(**{run.parts[0].estimator.section: {needs.setting: None}})


def _read_table(path: Path, plugins: Collection[str]) -> list[tuple[str, FinishedRun]]:
    """The runs in a table with the names of their methods, which in tables of earlier versions are those of their estimators."""
    try:
        values = parsed(path.read_bytes())
        methods = _part(values, "methods", list)
        named = [
            (method, _run_of(run, str(path), plugins)) for method in methods for run in _part(method, "runs", list)
        ]
        return [(str(method.get("name", run.config.estimator)), run) for method, run in named]
    except OSError as error:
        raise ConfigError(f"--tables {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--tables {path} is not the table.json of a comparison ({error})") from None


def _run_of(values: object, where: str, plugins: Collection[str]) -> FinishedRun:
    """A run in a table. Raises `ValueError` and `ConfigError`."""
    summary = flat(_part(values, "summary", dict))
    config = from_values(_part(values, "config", dict), where, plugins)
    points = [flat(point) for point in _part(values, "curve", list)]
    curve = [tuple(_number(point, name) for name in ("flops", "bytes", "val_bpb")) for point in points]
    if not isinstance(summary.get("parameters"), int):
        raise ValueError("a summary has no number of parameters")
    return FinishedRun(config, summary, [(flops, num_bytes / 1e6, bpb) for flops, num_bytes, bpb in curve])


Kind = TypeVar("Kind", list, dict)


def _part(values: object, name: str, kind: type[Kind]) -> Kind:
    part = values.get(name) if isinstance(values, dict) else None
    if not isinstance(part, kind):
        raise ValueError(f"it has no {name} where one belongs")
    return part


def _number(point: Flat, name: str) -> float:
    if not isinstance(value := point.get(name), int | float):
        raise ValueError(f"a point of a curve has no {name}")
    return float(value)


def by_variant(runs: Mapping[Key, FinishedRun], names: Sequence[str]) -> Runs:
    """The runs of each of `names`, sorted by seed; names without runs are left out."""
    grouped = {name: [runs[key] for key in sorted(runs) if key[0] == name] for name in names}
    return {name: own for name, own in grouped.items() if own}


def curve(folder: Path, config: RunConfig | None = None) -> Curve:
    """Training FLOPs, training megabytes and held-out bits per byte at each validation of a run. FLOPs use the measured rates."""
    config = read_config(folder) if config is None else config
    model = load_model(folder, modules_of(config)).model
    flops, counted_bytes, points = 0.0, 0.0, []
    for record in read_metrics(folder):
        # Not every step may be logged: bytes between the last training record and a validation count at the validation's rate.
        prefix = "" if "rate" in record else "val_"
        bytes_so_far, rate = record.get("bytes"), record.get(f"{prefix}rate")
        if not isinstance(bytes_so_far, int | float) or not isinstance(rate, float):
            continue
        inner = [record.get(f"{prefix}{level_prefix(level)}rate") for level in range(1, config.depth)]
        inner_rates = [one for one in inner if isinstance(one, float)]
        if bytes_so_far > counted_bytes:
            per_byte = matrix_flops(model, rate=rate, inner_rates=inner_rates, samples=config.samples).total
            flops, counted_bytes = flops + (bytes_so_far - counted_bytes) * per_byte, float(bytes_so_far)
        if isinstance(bpb := record.get("val_bpb"), float):
            points.append((flops, bytes_so_far / 1e6, bpb))
    return points
