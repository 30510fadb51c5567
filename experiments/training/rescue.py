"""Where a run is saved when its folder can no longer be written to."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path


class RunFolder:
    """The folder of a run, which may be deleted, unmounted or replaced while the run trains.

    Its inode tells it from another of the same path; where `held` keeps it open, no other gets that inode.
    """

    def __init__(self, path: Path):
        self.path, self._inode = path, path.stat().st_ino

    def require_there(self) -> None:
        """Raise `OSError` where it is gone."""
        if not self.path.is_dir() or self.path.stat().st_ino != self._inode:
            raise FileNotFoundError(f"{self.path} has vanished while the run was at work there")


def save_elsewhere(folder: Path, write: Callable[[Path], object]) -> Path | None:
    """The first of a folder beside `folder` and one for temporary files that `write` succeeds in; None where both fail."""
    for place in _places(folder):
        try:
            write(place)
        except Exception:  # orbax lets whatever its writers raise through; the next place may do
            shutil.rmtree(place, ignore_errors=True)
        else:
            return place
    return None


def _places(folder: Path) -> Iterator[Path]:
    """New empty folders; those that cannot be made are left out."""
    folder, number = folder.absolute(), 1
    with suppress(OSError):
        while (beside := folder.with_name(f"{folder.name}-rescued{'' if number == 1 else f'-{number}'}")).exists():
            number += 1
        beside.mkdir()
        yield beside
    with suppress(OSError):
        yield Path(tempfile.mkdtemp(prefix=f"{folder.name}-rescued-"))
