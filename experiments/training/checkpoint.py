"""Checkpoints: everything a run needs to go on bit for bit, committed by one rename, checked when read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import jax
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree

from experiments.config.errors import ConfigError, RunError, one_line
from experiments.config.structure import flat, parsed, structured
from experiments.processes.processes import ALONE, AbstractProcesses
from experiments.training.digests import Described, described, sha256_of, shapes_of
from experiments.training.sharding import on_host
from unet.files.saving import write_atomically

_TRASH = "trash"
_DAMAGED = "damaged"
"""Folder for checkpoints that cannot be read, until there is a newer one that can."""
SHA256 = 64
"""Hexadecimal digits of a SHA-256."""
_OF_THE_COMMIT = frozenset({"_CHECKPOINT_METADATA", "commit_success.txt"})
"""Orbax writes these last, after the list of files; nothing in a checkpoint depends on them."""
_FILES = "files.json"
"""SHA-256 of every file of a checkpoint, beside them."""

_LONGEST = 24 * 60 * 60
"""Seconds that writing a checkpoint may take: a slow file system is not an error."""

Arrays = TypeVar("Arrays", bound=PyTree[Array])


@dataclass(frozen=True)
class Progress:
    """What is not an array: steps taken, seconds spent training, where the data stands, and what data it is."""

    step: int
    seconds: float
    data: dict[str, object]
    fingerprint: str


@dataclass(frozen=True)
class Meta:
    """`Progress`, and of every array by name its shape, dtype and digest."""

    step: int
    seconds: float
    data: dict[str, object]
    fingerprint: str
    leaves: dict[str, Described]


@dataclass(frozen=True)
class Restored(Generic[Arrays]):
    """A checkpoint that was read and found whole."""

    arrays: Arrays
    progress: Progress


class DamagedError(Exception):
    """A checkpoint is not as it was written."""


class SaveError(RunError):
    """A checkpoint could not be written."""


class Checkpoints:
    """The checkpoints of one run, by step. Opening them sweeps away what a killed process left half written.

    Where several `processes` train together each writes the parts of arrays that it holds, and all call the same methods.
    """

    def __init__(self, folder: Path, keep: int, processes: AbstractProcesses = ALONE):
        self._folder, self._processes = folder.absolute(), processes
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_quiet_logs)
        self._writing: int | None = None
        self._failed_step: int | None = None
        self._hook = sys.unraisablehook
        self._keep, self._manager = keep, self._opened(keep)
        if processes.leads:
            shutil.rmtree(self._folder / _TRASH, ignore_errors=True)

    def _opened(self, keep: int, *, again: bool = False) -> ocp.CheckpointManager:
        """`again`: after a failure, of which nothing is swept away here, and whose folder may be gone."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=not again,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(timeout_secs=_LONGEST, post_finalization_callback=self._complete),
            cleanup_tmp_directories=not again,
            # A rename is atomic, a recursive delete is not: a half-deleted checkpoint must not look like one.
            todelete_subdir=_TRASH,
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def _complete(self) -> None:
        """Called, in a thread of process 0, once all of a checkpoint is there and before it is renamed: no list is missing."""
        for folder in self._folder.glob(f"{self._writing}.*"):
            write_list(folder)

    @property
    def latest(self) -> int | None:
        """The step of the newest one that is committed."""
        return max((step for step in self._manager.all_steps() if step != self._writing), default=None)

    def save(self, arrays: PyTree[Array], progress: Progress) -> None:
        """Commit a checkpoint; returns once it is complete. The same step is not written twice.

        Raises `SaveError` where it, or the one before it, cannot be written; what was written of it is deleted.
        """
        self.begin(arrays, progress)
        self.finish()

    def begin(self, arrays: PyTree[Array], progress: Progress) -> None:
        """Begin to write a checkpoint, after the one before it is complete; returns once the arrays may change. Raises as `save`
        does."""
        self.finish()
        self._sweep()
        if progress.step in self._steps():
            return
        meta = {**vars(progress), "leaves": described(arrays)}
        # Before the save, since the other writes of one that fails may end while its exception is on its way here.
        sys.unraisablehook = self._quiet_threads
        self._writing = progress.step
        try:
            self._manager.save(
                progress.step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)),
                force=True,
            )
        except Exception as error:  # orbax and tensorstore raise what they like
            raise self._failed(error) from error

    def finish(self) -> bool:
        """Return once the checkpoint that was begun is complete; whether there was one. Raises as `save` does. Several processes
        call this together."""
        if self._writing is None:
            return False
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # as above
            raise self._failed(error) from error
        self._writing, sys.unraisablehook = None, self._hook
        if self._processes.leads:
            for name in (_TRASH, _DAMAGED):
                shutil.rmtree(self._folder / name, ignore_errors=True)
        return True

    def _failed(self, error: Exception) -> SaveError:
        """What to raise where a checkpoint cannot be written, of which nothing is left then."""
        step, self._writing = self._writing, None
        self._failed_step = step
        # One of several processes does not get further, and the next run sweeps up.
        if self._processes.count == 1:
            # A manager raises an error of its threads again at the next save.
            with contextlib.suppress(Exception):
                self._manager.close()
            with contextlib.suppress(Exception):
                self._manager = self._opened(self._keep, again=True)
            self._sweep()
        return SaveError(f"the checkpoint of step {step} cannot be written ({said(error)})")

    def _quiet_threads(self, unraisable: sys.UnraisableHookArgs) -> None:
        """The writes of a checkpoint that failed go on reporting to an event loop that is closed."""
        if not (isinstance(unraisable.exc_value, RuntimeError) and "loop is closed" in str(unraisable.exc_value)):
            self._hook(unraisable)

    @property
    def written(self) -> bool:
        """Whether the checkpoint that was begun, if there was one, is there or has failed: `finish` does not wait then."""
        return not self._manager.is_saving_in_progress()

    def _sweep(self) -> None:
        """Delete what there is of a checkpoint that failed. Other threads may go on writing it for a moment, so the next save and
        the end do this again."""
        if self._failed_step is not None:
            for left in self._folder.glob(f"{self._failed_step}.*"):
                shutil.rmtree(left, ignore_errors=True)

    def restore(self, like: Arrays, note: Callable[[str], None]) -> Restored[Arrays] | None:
        """The latest checkpoint that is whole, with the structure and the devices of `like`; None where none was committed.
        `note` is told of damaged ones, which are put aside.

        Raises `ConfigError` where all are damaged, or one does not fit.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._steps(), reverse=True):
            try:
                self._require_undamaged(step)
                restored = self._restored(step, like)
            except DamagedError as error:
                damaged[step] = f"the checkpoint {self._folder / str(step)} is damaged ({error})"
                continue
            for later, sentence in damaged.items():
                self._put_aside(later)
                note(f"{sentence}: going on from that of step {step}")
            self._processes.require_same("checkpoint", json.dumps(vars(restored.progress), sort_keys=True).encode())
            return restored
        if damaged:
            raise ConfigError(
                f"{' and '.join(damaged.values())}: there is none to go on from; start again with --overwrite"
            )
        return None

    def _steps(self) -> list[int]:
        """The steps that process 0 finds: file systems of networks may show others an older list."""
        return json.loads(self._processes.said(json.dumps([*self._manager.all_steps()]))[0])

    def _require_undamaged(self, step: int) -> None:
        """Raise `DamagedError` in all processes where process 0 finds a file that is not as it was written."""
        found = ""
        if self._processes.leads:
            try:
                require_undamaged(self._folder / str(step))
            except DamagedError as error:
                found = str(error)
        if found := self._processes.said(found)[0]:
            raise DamagedError(found)

    def _restored(self, step: int, like: Arrays) -> Restored[Arrays]:
        try:
            return self._read_whole(step, like)
        except DamagedError as error:
            if self._processes.count == 1:
                raise
            # What one of several finds, the others need not find.
            raise RunError(f"the checkpoint {self._folder / str(step)} cannot be read here ({error})") from error

    def _read_whole(self, step: int, like: Arrays) -> Restored[Arrays]:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            meta = structured(self._read(step, "meta", ocp.args.JsonRestore()), Meta)
        except Exception as error:  # orbax lets whatever its readers raise through, bare Exceptions among them
            raise _damage(error) from error
        expected = shapes_of(like)
        for name in sorted(meta.leaves.keys() | expected.keys()):
            if name not in meta.leaves or name not in expected or meta.leaves[name][:2] != expected[name]:
                raise ConfigError(
                    f"the checkpoint {self._folder / str(step)} does not fit this model: {one_line(name, 80)} differs; resume it "
                    "with its own settings"
                )
        try:
            arrays = self._read(step, "state", ocp.args.StandardRestore(abstract))
        except Exception as error:  # as above
            raise _damage(error) from error
        if meta.step != step or not as_written(arrays, meta.leaves):
            raise DamagedError("its bits are not those written")
        return Restored(arrays, Progress(meta.step, meta.seconds, meta.data, meta.fingerprint))

    def _put_aside(self, step: int) -> None:
        if self._processes.leads:
            (self._folder / _DAMAGED).mkdir(exist_ok=True)
            shutil.rmtree(self._folder / _DAMAGED / str(step), ignore_errors=True)
            (self._folder / str(step)).rename(self._folder / _DAMAGED / str(step))
        self._processes.wait()
        self._manager.reload()

    def _read(self, step: int, item: str, how: ocp.args.CheckpointArgs):
        """One part of a checkpoint; its type is whatever `how` reads."""
        return self._manager.restore(step, args=ocp.args.Composite(**{item: how}))[item]

    def close(self) -> None:
        """End what was begun, and let go of the files. Raises as `save` does."""
        try:
            self.finish()
        finally:
            self._manager.close()
            self._sweep()
            sys.unraisablehook = self._hook


def write_list(folder: Path) -> Path:
    """Write the list of a checkpoint's files, which `require_undamaged` reads; returns its path."""
    write_atomically(folder / _FILES, json.dumps(_digests(folder), indent=1) + "\n")
    return folder / _FILES


def require_undamaged(folder: Path) -> None:
    """Raise `DamagedError` naming the first file of a checkpoint that is not as it was written.

    Orbax would notice most of it too, but the threads of its readers go on complaining after it has given up. Checkpoints of
    earlier versions may have no list: what is read is checked even so.
    """
    try:
        written = flat(parsed((folder / _FILES).read_bytes()))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise DamagedError(f"{_FILES}: {said(error)}") from error
    try:
        found = _digests(folder)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        # Other failures of the system may pass, and say nothing about the checkpoint.
        raise DamagedError(said(error)) from error
    for name in sorted((written.keys() | found.keys()) - _OF_THE_COMMIT):
        if written.get(name) != found.get(name):
            what = "is missing" if name not in found else "is not as it was written"
            raise DamagedError(f"{one_line(name, 80)} {what}")


def _quiet_logs(record: logging.LogRecord) -> bool:
    """Orbax logs what it raises as well, with tracebacks, from several threads and after it has given up."""
    return record.levelno < logging.ERROR or "orbax" not in f"{record.pathname} {record.getMessage()}"


def _damage(error: Exception) -> Exception:
    """What a failure to read means: damage, unless there was only no memory for it."""
    return error if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) else DamagedError(said(error))


def said(error: Exception) -> str:
    """The first line of an exception of the system or of orbax."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # The sentence of tensorstore begins with paths, again and again.
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    lines = str(error).strip().splitlines()
    return one_line(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__, 200)


def as_written(arrays: PyTree[Array], leaves: Mapping[str, Described]) -> bool:
    """Whether arrays have the bits that were described when they were written. Every process has to call this."""
    if any(len(digest) == SHA256 for *_, digest in leaves.values()):
        # Those of a run from before arrays were described in parts.
        paths = jax.tree_util.tree_leaves_with_path(arrays)
        found = {
            jax.tree_util.keystr(path): (tuple(leaf.shape), str(leaf.dtype), sha256_of(on_host(leaf)))
            for path, leaf in paths
        }
    else:
        found = described(arrays)
    return all(leaves.get(name) == one for name, one in found.items())


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder` but the list itself and what an operating system leaves."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _FILES)
    return {path.relative_to(folder).as_posix(): _digest(path) for path in files if not path.name.startswith(".")}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
