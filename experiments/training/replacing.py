"""A run that takes the place of another: the old one is kept until the new one has its first checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.config.errors import RunError, failure
from experiments.training.run_dir import MOVING, REPLACED, has_checkpoint, is_temporary
from unet.files.saving import CONFIG

# Every state that a killed process can leave is told from the others by which of these folders there is.
_DISCARDED = ".discarded.tmp"
"""An old run that is being deleted."""


@contextmanager
def replacing(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Moves the run in `folder` aside, to a folder inside, so that a new one can begin there.

    Where the block fails before the new run has a checkpoint, the old run is put back, and `note` is told so. Raises `RunError`
    where the old run cannot be moved, which is then as before.
    """
    _settle(folder)
    try:
        moved = _move_aside(folder)
    except BaseException as error:
        _put_back(folder)
        if isinstance(error, OSError):
            raise RunError(f"the run in {folder} cannot be replaced: {failure(error)}") from None
        raise
    try:
        yield
    except BaseException:
        if moved:
            try:
                if (folder / REPLACED).is_dir() and has_checkpoint(folder):
                    discard_replaced(folder)
                elif (folder / REPLACED).is_dir():
                    _restore(folder)
                    note(f"the run that was in {folder} before is there again")
            except OSError as error:
                note(f"the run that was in {folder} before is kept in {folder / REPLACED} ({failure(error)})")
        raise


def discard_replaced(folder: Path) -> None:
    """Delete the run that was moved aside, if there is one: the new one has a checkpoint."""
    kept, discarded = folder / REPLACED, folder / _DISCARDED
    if kept.is_dir() or discarded.is_dir():
        shutil.rmtree(discarded, ignore_errors=True)
        if kept.is_dir():
            # A rename is atomic, a recursive delete is not: half a run must not look like one.
            kept.rename(discarded)
        shutil.rmtree(discarded, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Finish what a killed process began."""
    _put_back(folder)
    if (folder / REPLACED).is_dir():
        if has_checkpoint(folder):
            discard_replaced(folder)
        else:
            _restore(folder)
    for path in folder.iterdir():
        if is_temporary(path.name):
            _delete(path)


def _move_aside(folder: Path) -> bool:
    """Whether there was a run to move."""
    present = list(folder.iterdir())
    if not present:
        return False
    (folder / MOVING).mkdir()
    # The configuration first, and last on the way back: without it nobody takes what is there for a run.
    for path in sorted(present, key=lambda path: path.name != CONFIG):
        path.rename(folder / MOVING / path.name)
    (folder / MOVING).rename(folder / REPLACED)
    return True


def _put_back(folder: Path) -> None:
    """Undo a move that did not end."""
    moving = folder / MOVING
    if moving.is_dir():
        for path in sorted(moving.iterdir(), key=lambda path: path.name == CONFIG):
            path.rename(folder / path.name)
        moving.rmdir()


def _restore(folder: Path) -> None:
    """Delete what there is of the new run, and put the old one back."""
    for path in list(folder.iterdir()):
        if path.name != REPLACED:
            _delete(path)
    (folder / REPLACED).rename(folder / MOVING)
    _put_back(folder)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
