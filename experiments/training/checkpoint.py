"""Checkpoints: everything a run needs to go on bit for bit, committed by one rename, checked when read."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree

from experiments.config.errors import ConfigError
from experiments.training.run_dir import write_atomically

_TRASH = "trash"
_FILES = "files.json"
"""SHA-256 of every file of a checkpoint, beside them."""

Arrays = TypeVar("Arrays", bound=PyTree[Array])


@dataclass(frozen=True)
class Progress:
    """What is not an array: steps taken, seconds spent training, where the data stands, and what data it is."""

    step: int
    seconds: float
    data: dict[str, object]
    fingerprint: str


@dataclass(frozen=True)
class Restored(Generic[Arrays]):
    """A checkpoint that was read and found whole."""

    arrays: Arrays
    progress: Progress


class Checkpoints:
    """The checkpoints of one run, by step. Opening them sweeps away what a killed process left half written."""

    def __init__(self, folder: Path, keep: int):
        self._folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
            # A rename is atomic, a recursive delete is not: a half-deleted checkpoint must not look like one.
            todelete_subdir=_TRASH,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._sweep()

    def save(self, arrays: PyTree[Array], progress: Progress) -> None:
        """Commit a checkpoint; returns once it is complete. The same step is not written twice."""
        if progress.step in self._manager.all_steps():
            return
        meta = {**vars(progress), "leaves": _describe(arrays)}
        self._manager.save(
            progress.step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)),
            force=True,
        )
        self._list_files(progress.step)
        self._sweep()

    def restore(self, like: Arrays) -> Restored[Arrays] | None:
        """The latest checkpoint, with the structure and the devices of `like`; None where none was committed.

        Raises `ConfigError` where it cannot be read, does not fit, or holds other bits than were written.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        where = f"the checkpoint {self._folder / str(step)}"
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        self._check_files(step, where)
        try:
            meta = self._read(step, "meta", ocp.args.JsonRestore())
            saved, expected = meta["leaves"], _describe(like)
            for name in sorted(saved.keys() | expected.keys()):
                if name not in saved or name not in expected or saved[name][:2] != expected[name][:2]:
                    raise ConfigError(
                        f"{where} does not fit this model: {name} differs; resume it with its own settings"
                    )
            arrays = self._read(step, "state", ocp.args.StandardRestore(abstract))
        except ConfigError:
            raise
        except Exception as error:  # orbax lets whatever its readers raise through, bare Exceptions among them
            raise _damaged(where, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}") from error
        if _describe(arrays) != saved:
            raise _damaged(where, "its bits are not those written")
        return Restored(arrays, Progress(meta["step"], meta["seconds"], meta["data"], meta["fingerprint"]))

    def _list_files(self, step: int) -> None:
        folder = self._folder / str(step)
        digests = {str(path.relative_to(folder)): _digest(path) for path in sorted(_files(folder))}
        write_atomically(folder / _FILES, json.dumps(digests, indent=1) + "\n")

    def _check_files(self, step: int, where: str) -> None:
        """Raises `ConfigError` naming the first file that is not as it was written.

        Orbax would notice most of it too, but the threads of its readers go on complaining after it has given up. A
        process killed between the checkpoint's rename and its list leaves no list: what is read is checked even so.
        """
        folder = self._folder / str(step)
        try:
            digests = json.loads((folder / _FILES).read_text())
        except FileNotFoundError:
            return
        except ValueError as error:
            raise _damaged(where, f"{_FILES} is no JSON") from error
        for name, digest in digests.items():
            try:
                same = _digest(folder / name) == digest
            except FileNotFoundError as error:
                raise _damaged(where, f"{name} is missing") from error
            if not same:
                raise _damaged(where, f"{name} is not as it was written")

    def _read(self, step: int, item: str, how: ocp.args.CheckpointArgs):
        """One part of a checkpoint; its type is whatever `how` reads."""
        return self._manager.restore(step, args=ocp.args.Composite(**{item: how}))[item]

    def close(self) -> None:
        self._manager.close()

    def _sweep(self) -> None:
        shutil.rmtree(self._folder / _TRASH, ignore_errors=True)


def _damaged(where: str, what: str) -> ConfigError:
    return ConfigError(f"{where} is damaged ({what}); delete that folder to go on from the one before it")


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and path.name != _FILES)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(arrays: PyTree[Array]) -> dict[str, list[object]]:
    """Shape, dtype and SHA-256 of every leaf by its path."""
    described: dict[str, list[object]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        value = np.ascontiguousarray(leaf)
        digest = hashlib.sha256(value.view(np.uint8).data if value.ndim else value.tobytes()).hexdigest()
        described[jax.tree_util.keystr(path)] = [list(value.shape), str(value.dtype), digest]
    return described
