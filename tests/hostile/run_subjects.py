"""The files of a run's folder, and the table of a comparison."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

from experiments.comparison.finished import FinishedRun, read_tables
from experiments.config.errors import ConfigError
from experiments.config.files import from_values, to_json
from experiments.config.presets import PRESETS
from experiments.config.settings import RunConfig
from experiments.training.checkpoint import DamagedError, require_undamaged, write_list
from experiments.training.dropped import DroppedBoundaries
from experiments.training.metrics_log import read_metrics, undamaged_metrics
from experiments.training.run_dir import CONFIG, METRICS, SUMMARY, read_config, read_summary
from tests.hostile.subject import Subject

TINY = PRESETS["tiny"]


def _configs(folder: Path) -> list[bytes]:
    """Configurations of several kinds, those with the most sections among them."""
    plain = to_json(TINY)
    entropy = {"estimator": "entropy", "settings": {"entropy": {"model": "runs/bytes", "rule": "rise"}}}
    changed = to_json(from_values(json.loads(plain) | entropy, "seed"))
    return [text.encode() for text in (plain, changed, to_json(PRESETS["hnet-2stage-tiny"]))]


def _read_config(folder: Path, content: bytes) -> RunConfig:
    (folder / CONFIG).write_bytes(content)
    return read_config(folder)


def _metrics(folder: Path) -> list[bytes]:
    """A log of steps and validations."""
    lines = []
    for step in range(1, 6):
        lines.append({"step": step, "bytes": 64 * step, "loss": 5.5, "rate": 0.2, "overflow": 0.0, "early_bpb": None})
        lines.append({"step": step, "bytes": 64 * step, "val_bpb": 8.0, "val_rate": 0.25, "val_whitespace_auc": None})
        lines[-2] |= {"drawn_so_far": 0.2 * step, "dropped_so_far": 0.0, "seconds": 1.5}
    return ["".join(json.dumps(line) + "\n" for line in lines).encode()]


def _read_metrics(folder: Path, content: bytes) -> object:
    """As a run does that goes on, and then as a comparison does."""
    (folder / METRICS).write_bytes(content)
    records, damaged = undamaged_metrics(folder)
    shares = DroppedBoundaries.so_far(records, 1).shares
    assert all(isinstance(share, float) for share in shares)
    return list(read_metrics(folder)), damaged


SUMMARY_SEED = {"estimator": "sfe", "seed": 0, "parameters": 8184, "val_bpb": 8.25, "val_early_bpb": None, "steps": 8}


def _read_summary(folder: Path, content: bytes) -> object:
    (folder / SUMMARY).write_bytes(content)
    run = FinishedRun(TINY, read_summary(folder), [])
    assert isinstance(run.value("val_bpb"), float)
    return run.summary


def _write_checkpoint(folder: Path) -> None:
    """Files as those of a checkpoint."""
    for name in ("_METADATA", "state/manifest.ocdbt", "state/d/76d2ed59b531827d", "meta/metadata"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")


def _lists(folder: Path) -> list[bytes]:
    _write_checkpoint(folder)
    return [write_list(folder).read_bytes()]


def _read_list(folder: Path, content: bytes) -> bool:
    _write_checkpoint(folder)
    (folder / "files.json").write_bytes(content)
    require_undamaged(folder)
    return True


def _tables(folder: Path) -> list[bytes]:
    """The table of a comparison of two methods."""
    methods = []
    for name in ("sfe", "uniform"):
        config = dataclasses.replace(TINY, estimator=name)
        run = FinishedRun(config, SUMMARY_SEED | {"estimator": name}, [(1e6, 0.5, 8.5), (2e6, 1.0, 8.25)])
        methods.append({"name": name, "seeds": [0], "runs": [run.json()]})
    return [json.dumps({"reference": "uniform", "methods": methods}).encode()]


def _read_table(folder: Path, content: bytes) -> object:
    path = folder / "table.json"
    path.write_bytes(content)
    return read_tables([path], {("sfe", 0): TINY, ("uniform", 0): dataclasses.replace(TINY, estimator="uniform")})


refused = partial(Subject, refused=(ConfigError,))

SUBJECTS = (
    refused("config.json", _configs, _read_config, structure="json"),
    refused("metrics.jsonl", _metrics, _read_metrics, structure="json lines"),
    refused("summary.json", lambda folder: [json.dumps(SUMMARY_SEED).encode()], _read_summary, structure="json"),
    refused("table.json", _tables, _read_table, structure="json"),
    Subject("files.json", _lists, _read_list, (DamagedError,), "json", checked=True),
)
