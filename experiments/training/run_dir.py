"""The files of a run: written atomically, never over those of another run."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks; runs there are not kept from sharing a folder.
    fcntl = None

from experiments.config.errors import ConfigError, RunError, one_line, require
from experiments.config.files import from_json, to_json
from experiments.config.settings import RunConfig
from experiments.config.structure import Flat, flat, parsed
from unet.files.saving import CONFIG, WEIGHTS, write_atomically

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
PREPARED = "prepared.safetensors"
"""What the estimator found out from text before training."""
MOVING = ".moving.tmp"
"""Holds the files of a run on their way to `replaced` or back; nothing of a new run is there yet."""
REPLACED = "replaced"
"""The run that was in a folder before, until the new one has its first checkpoint."""
OWN_FILES = (
    *(CONFIG, METRICS, SUMMARY, CHECKPOINTS, "report.html", "boundaries.png"),
    *(WEIGHTS, PREPARED, REPLACED),
    # What trackers leave.
    *("tensorboard", "wandb", "trackio"),
)

OF_NO_EFFECT = (
    "out",
    "resume",
    "overwrite",
    "log_every",
    "plugin",
    "config",
    "log_seconds",
    "quiet",
    "tracker",
    "distributed",
)
"""Settings that do not change the results of a run, so that they may differ when it is resumed."""
OF_DEVICES = ("devices", "mesh")
"""Settings that change a run only by rounding errors."""


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


def make_folder(folder: Path, flag: str = "--out") -> list[Path]:
    """Make `folder` where it is missing, and try whether files can be written there. Returns the folders made, the innermost
    first.

    Raises `ConfigError` where it is a file, `RunError` where it cannot be made or written to; then nothing is left behind.
    """
    made: list[Path] = []
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{flag} {folder} is a file; name a folder")
        missing = [one for one in (folder, *folder.parents) if not one.exists()]
        for one in reversed(missing):
            one.mkdir(exist_ok=True)
            made.insert(0, one)
        trial = folder / ".trial.tmp"
        trial.write_bytes(b"")
        trial.unlink()
    except OSError as error:
        remove_empty(made)
        reason = error.strerror or type(error).__name__
        raise RunError(f"{flag} {folder}: nothing can be written there ({reason}); name another folder") from None
    return made


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove those of `folders` that have nothing in them, the innermost first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextmanager
def held(folder: Path, note: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Keep `folder`, made where it is missing, to one process, for as long as that process lives.

    The lock is on the folder itself and leaves no file, nor does a folder stay that was made here and is empty at the end. Where
    the file system has no locks, `note` is told so. Raises `ConfigError` where another process holds it, and what `make_folder`
    raises.
    """
    made = make_folder(folder)
    descriptor = None
    try:
        descriptor = None if fcntl is None else os.open(folder, os.O_RDONLY)
        if descriptor is not None and not _locked(folder, descriptor):
            note(
                f"{folder} lies on a file system without locks: nothing keeps a second run from working there, so start none"
            )
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
        remove_empty(made)


def _locked(folder: Path, descriptor: int) -> bool:
    """Whether the file system gave the lock. Raises `ConfigError` where another process has it."""
    assert fcntl is not None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"another process is at work in {folder}: wait for it, or name another --out") from None
    except OSError as error:
        # NFS says EBADF of folders, which cannot be opened for writing.
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF, errno.EINVAL):
            return False
        raise
    return True


def at_work(folder: Path) -> bool:
    """Whether a process is at work on the run in `folder`, as far as locks tell. Asking takes the lock for a moment."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def require_free(config: RunConfig) -> None:
    """Raise `ConfigError` where the folder of a new run has anything in it, unless the run may overwrite it; even then a folder
    with anything that no run leaves is refused."""
    folder = config.run_dir
    present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    ours = [name for name in present if is_temporary(name)]
    if len(present) > len(ours) and not config.overwrite:
        raise ConfigError(
            f"{folder} is not empty: go on with its run (--resume), delete it first (--overwrite), or name another --out"
        )
    foreign = [name for name in present if name not in OWN_FILES and name not in ours]
    if foreign:
        names = one_line(", ".join(foreign[:3]))
        raise ConfigError(f"{folder} holds files that no run wrote ({names}); it is left as it is")


def prepare_new(config: RunConfig) -> Path:
    """Make the folder of a new run and put its configuration there. Raises what `require_free` and `make_folder` raise."""
    make_folder(config.run_dir)
    require_free(config)
    write_atomically(config.run_dir / CONFIG, to_json(dataclasses.replace(config, resume=False, overwrite=False)))
    return config.run_dir


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


def with_any_lanes(run: RunConfig) -> RunConfig:
    """A run without its number of lanes, which several processes choose by their number: only the order of the text depends on
    it."""
    return dataclasses.replace(run, data=dataclasses.replace(run.data, lanes=None))


def moved(run: RunConfig, saved: RunConfig) -> RunConfig:
    """`saved` with the places that `run` has for its data, their cache, the weights it began with and the run whose model it
    reads: what lies there is recognised by its content. The model is known only where it was kept with the run."""
    places = {name: getattr(run.data, name) for name in ("cache", "train", "valid", "test")}
    data = dataclasses.replace(saved.data, **places)
    init = saved.init if saved.init is None or run.init is None else run.init
    there = dataclasses.replace(saved, dataset=run.dataset, data=data, init=init)
    needs = saved.first.prerequisite
    if needs is None or run.estimator != saved.estimator or not (run.run_dir / PREPARED).is_file():
        return there
    value = getattr(run.first, needs.setting)
    return there.with_settings(**{saved.parts[0].estimator.section: {needs.setting: value}})


def has_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint was committed in the folder of a run."""
    inside = folder / CHECKPOINTS
    return inside.is_dir() and any(path.name.isdigit() for path in inside.iterdir())


def read_config(folder: Path, plugins: Collection[str] = ()) -> RunConfig:
    """The configuration of the run in `folder`; `plugins` are modules that it may name. Raises `ConfigError` if there is none."""
    path = folder / CONFIG
    if not path.is_file():
        kept = [folder / name for name in (MOVING, REPLACED) if (folder / name).is_dir()]
        where = f"; the run that was to be replaced is in {kept[0]}" if kept else ""
        raise ConfigError(f"{folder} holds no run to resume: there is no {CONFIG} in it{where}")
    return from_json(path.read_bytes(), str(path), plugins)


def read_summary(folder: Path) -> Flat:
    """The results of a finished run. Raises `ConfigError` where they are damaged."""
    path = folder / SUMMARY
    try:
        values = flat(parsed(path.read_bytes()))
        if not isinstance(values.get("parameters"), int):
            raise ValueError("it has no number of parameters")
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}): --resume of that run writes it again") from None
    return values


def is_temporary(name: str) -> bool:
    """Whether a file of this name was left by a process that was killed while it wrote it."""
    return name.startswith(".") and name.endswith(".tmp")
