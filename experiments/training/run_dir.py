"""The files of a run: written atomically, never over those of another run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks; runs there are not kept from sharing a folder.
    fcntl = None

from experiments.config.errors import ConfigError, require
from experiments.config.files import from_json, to_json
from experiments.config.settings import RunConfig
from unet.files.saving import CONFIG, WEIGHTS, write_atomically

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
PREPARED = "prepared.safetensors"
"""What the estimator found out from text before training."""
OWN_FILES = (
    *(CONFIG, METRICS, SUMMARY, CHECKPOINTS, "report.html", "boundaries.png"),
    *(WEIGHTS, PREPARED),
)

OF_NO_EFFECT = ("out", "resume", "overwrite", "log_every", "plugin")
"""Settings that do not change the results of a run, so that they may differ when it is resumed."""

Record = Mapping[str, float | int | str | None]


def json_text(value: object) -> str:
    """`value` as JSON, which has neither NaN nor infinity: what is not a number is null. Dataclasses become objects, paths
    strings."""

    def plain(part: object) -> object:
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            return plain(dataclasses.asdict(part))
        if isinstance(part, dict):
            return {key: plain(inner) for key, inner in part.items()}
        if isinstance(part, list | tuple):
            return [plain(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(plain(value), indent=2, default=str) + "\n"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep `folder`, made where it is missing, to one process, for as long as that process lives.

    The lock is on the folder itself and leaves no file. Raises `ConfigError` where another process holds it, or where
    `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"another process is at work in {folder}: wait for it, or name another --out") from None
    try:
        yield
    finally:
        os.close(descriptor)


def prepare_new(config: RunConfig) -> Path:
    """Make the folder of a new run and put its configuration there.

    Raises `ConfigError` where the folder has anything in it, unless the run may overwrite it; even then only what a run
    leaves is deleted, and a folder with anything else in it is refused.
    """
    folder = config.run_dir
    present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if present and not config.overwrite:
        raise ConfigError(
            f"{folder} is not empty: go on with its run (--resume), delete it first (--overwrite), or name another --out"
        )
    foreign = [name for name in present if name not in OWN_FILES and not _is_temporary(name)]
    if foreign:
        raise ConfigError(f"{folder} holds files that no run wrote ({', '.join(foreign[:3])}); it is left as it is")
    for name in present:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG, to_json(config))
    return folder


def refuse_existing(folder: Path, names: Collection[str], *, overwrite: bool) -> None:
    """Raise `ConfigError` where one of the files `names` is in `folder` already and may not be overwritten."""
    present = [name for name in names if (folder / name).exists()]
    require(
        overwrite or not present,
        f"{folder} holds {', '.join(present)} already: replace it (--overwrite) or name another --out",
    )


def differing(run: RunConfig, saved: RunConfig, may_differ: Collection[str] = ()) -> list[str]:
    """The settings in which two runs differ, those of no effect and `may_differ` left aside."""
    aside = (*OF_NO_EFFECT, *may_differ, "settings")
    names = [field.name for field in dataclasses.fields(RunConfig) if field.name not in aside]
    new, old = run.resolved.settings, saved.resolved.settings
    return [
        *(name for name in names if getattr(run, name) != getattr(saved, name)),
        *(name for name in sorted({*new, *old}) if new.get(name) != old.get(name)),
    ]


def read_config(folder: Path, plugins: Collection[str] = ()) -> RunConfig:
    """The configuration of the run in `folder`; `plugins` are modules that it may name. Raises `ConfigError` if there is none."""
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(f"{folder} holds no run to resume: there is no {CONFIG} in it")
    return from_json(path.read_text(), str(path), plugins)


def read_metrics(folder: Path) -> Iterator[dict[str, float | int | str | None]]:
    """The records of a run in order; a last line that was cut off by a crash is left out."""
    path = folder / METRICS
    if not path.exists():
        return
    with path.open() as stream:
        for line in stream:
            if line.endswith("\n"):
                yield json.loads(line)


class MetricsLog:
    """`metrics.jsonl`, one JSON object a line, in order of `step`."""

    def __init__(self, folder: Path, keep_steps: int):
        """Opens the log, dropping records of steps after `keep_steps`, which a resumed run writes again."""
        kept = [record for record in read_metrics(folder) if _step(record) <= keep_steps]
        write_atomically(folder / METRICS, "".join(json.dumps(record) + "\n" for record in kept))
        self._stream = (folder / METRICS).open("a")

    def write(self, record: Record) -> None:
        """Append one record and hand it to the operating system."""
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def _step(record: Record) -> int:
    step = record["step"]
    if not isinstance(step, int):
        raise ConfigError(f"{METRICS} has a record whose step is {step!r}, not a whole number")
    return step


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")
