"""Finished runs as a comparison reads them: from their folders, or from the table of a comparison made elsewhere."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.comparison.pairs import Curve
from experiments.config.errors import ConfigError
from experiments.config.files import from_values, to_json
from experiments.config.settings import EstimatorName, RunConfig
from experiments.reporting.summary import Summary
from experiments.training.run_dir import SUMMARY, differing, read_config, read_metrics
from unet.files.saving import load
from unet.flops import matrix_flops
from unet.losses import level_prefix


@dataclass(frozen=True)
class FinishedRun:
    """A run's settings, its `summary.json` and its validation curve; its `folder`, where that is at hand."""

    config: RunConfig
    summary: Summary
    curve: Curve
    folder: Path | None = None

    @property
    def seed(self) -> int:
        return self.config.seed

    def value(self, key: str) -> float:
        """A number of its summary; NaN where there is none."""
        value = self.summary.get(key)
        return float(value) if isinstance(value, int | float) else math.nan

    def json(self) -> dict[str, object]:
        """As `table.json` keeps it."""
        points = [
            {"flops": flops, "bytes": round(1e6 * megabytes), "val_bpb": bpb} for flops, megabytes, bpb in self.curve
        ]
        config = json.loads(to_json(self.config))
        return {"seed": self.seed, "config": config, "summary": self.summary, "curve": points}


Runs = Mapping[EstimatorName, Sequence[FinishedRun]]
"""Finished runs by estimator, in the order of their seeds."""


def is_finished(folder: Path) -> bool:
    """Whether a run in this folder came to its end."""
    return (folder / SUMMARY).is_file()


def read_finished(folder: Path) -> FinishedRun:
    """The finished run in a folder."""
    return FinishedRun(read_config(folder), json.loads((folder / SUMMARY).read_text()), curve(folder), folder)


def read_tables(paths: Sequence[Path], runs: Sequence[RunConfig]) -> list[FinishedRun]:
    """Those of `runs` that the `table.json` of other comparisons have.

    Raises `ConfigError` for a file that is no such table, and for a run whose settings are other than those asked for.
    """
    asked = {(run.estimator, run.seed): run for run in runs}
    found: dict[tuple[EstimatorName, int], FinishedRun] = {}
    for path in paths:
        for run in _read_table(path):
            key = run.config.estimator, run.seed
            if key not in asked or key in found:
                continue
            # How many cores a run had moves its curve by rounding alone.
            if changed := differing(_elsewhere(run.config), _elsewhere(asked[key]), may_differ=("devices",)):
                raise ConfigError(
                    f"{path} has {key[0]} of seed {key[1]} with other settings for {', '.join(changed)}: leave the table out, or "
                    "ask for those settings"
                )
            found[key] = run
    return list(found.values())


def _elsewhere(run: RunConfig) -> RunConfig:
    """The settings without the place where a comparison has its byte model."""
    return dataclasses.replace(run, entropy=dataclasses.replace(run.entropy, model=None))


def _read_table(path: Path) -> list[FinishedRun]:
    try:
        methods = json.loads(path.read_text())["methods"]
        runs = [_run_of(run, str(path)) for method in methods for run in method["runs"]]
    except OSError as error:
        raise ConfigError(f"--tables {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"--tables {path} is not the table.json of a comparison ({error!r})") from None
    return runs


def _run_of(values: Mapping[str, object], where: str) -> FinishedRun:
    summary, points = values["summary"], values["curve"]
    if not isinstance(summary, dict) or not isinstance(points, list):
        raise TypeError("a run has a summary and a curve")
    config = from_values(values["config"], where)
    return FinishedRun(config, summary, [(point["flops"], point["bytes"] / 1e6, point["val_bpb"]) for point in points])


def by_estimator(runs: Sequence[FinishedRun], names: Sequence[EstimatorName]) -> Runs:
    """The runs of each of `names`, by seed; without those of which there is none."""
    sorted_runs = sorted(runs, key=lambda run: run.seed)
    grouped = {name: [run for run in sorted_runs if run.config.estimator == name] for name in names}
    return {name: own for name, own in grouped.items() if own}


def curve(folder: Path) -> Curve:
    """FLOPs spent, megabytes read and held-out bits per byte at each validation of a run; tokens as they were drawn."""
    config, model = read_config(folder), load(folder).model
    spent, before, points = 0.0, 0.0, []
    for record in read_metrics(folder):
        # The bytes since the last record of training, where it does not log every step, count at the rate of the validation.
        kind = "" if "rate" in record else "val_"
        read, rate = record["bytes"], record.get(f"{kind}rate")
        if not isinstance(read, int | float) or not isinstance(rate, float):
            continue
        inside = [record.get(f"{kind}{level_prefix(level)}rate") for level in range(1, len(config.levels))]
        rates = [one for one in inside if isinstance(one, float)]
        if read > before:
            flops = matrix_flops(model, rate=rate, inner_rates=rates, samples=config.samples)
            spent, before = spent + (read - before) * flops.total, float(read)
        if isinstance(bpb := record.get("val_bpb"), float):
            points.append((spent, read / 1e6, bpb))
    return points


def without(runs: Sequence[RunConfig], finished: Sequence[FinishedRun]) -> list[RunConfig]:
    """Those of `runs` that are not finished yet."""
    done = {(run.config.estimator, run.seed) for run in finished}
    return [run for run in runs if (run.estimator, run.seed) not in done]
