"""The files that a path, a folder or a glob names, each once."""

from __future__ import annotations

import glob
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path
from typing import Literal

from data.documents import DataError, shown

_POINTERS = {b"version https://git-lfs.github.com/spec/": "git lfs pull", b"/annex/objects/": "git annex get"}
"""How the small files begin that stand for large ones in a Git repository, and the command that gets the files themselves."""


@dataclass(frozen=True)
class FoundFile:
    """A file and its size in bytes."""

    path: Path
    size: int


@dataclass
class PassedOver:
    """What was not read: counts of hidden entries of folders, other names of the same files and folders (links), links to
    nothing, and things that are neither file nor folder; and the files and folders that could not be opened."""

    hidden: int = 0
    again: int = 0
    broken: int = 0
    special: int = 0
    closed: list[str] = field(default_factory=list)

    def note(self, name: str) -> tuple[str, ...]:
        """A note to the user about the data set `name`, if anything was passed over."""
        first = f" ({shown(self.closed[0])})" if self.closed else ""
        parts = (
            (self.closed, f"{len(self.closed):,} that could not be opened{first}"),
            (self.broken, f"{self.broken:,} link(s) to nothing"),
            (self.again, f"{self.again:,} further name(s) of the same files and folders"),
            (self.special, f"{self.special:,} that are neither file nor folder"),
            (self.hidden, f"{self.hidden:,} hidden file(s) and folder(s)"),
        )
        said = [text for count, text in parts if count]
        return (f"passed over in {name}: {', '.join(said)}",) if said else ()


def expanded(name: str) -> Path:
    """The path of a name, which may begin with ~. Raises `DataError` for the home folder of a user that does not exist."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise DataError(f"{shown(name)}: there is no such user's home folder; write the whole path") from None


def find_files(pattern: str) -> tuple[list[FoundFile], PassedOver]:
    """The files that `pattern` names, sorted, and what was passed over.

    A folder names all files in it, at any depth, except hidden ones. Linked folders are followed, and every file and folder is
    visited once, whatever its names are. Raises `DataError` if there are no files, and for files that only point to others.
    """
    passed = PassedOver()
    path = expanded(pattern)
    try:
        files, problem = _matches(path, pattern, passed)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot look for {shown(pattern)}: {getattr(error, 'strerror', None) or error}") from None
    if not files:
        raise DataError(
            f"{problem}; use docs, stdlib, enwik8:PATH, text8:PATH, codeparrot, codeparrot-clean, fineweb, fineweb-edu, "
            "fineweb-100BT, fineweb-edu-100BT, hub:owner/name/folder@revision, or the path of a file, a folder or a glob"
        )
    _check_pointers(files)
    return files, passed


def _matches(path: Path, pattern: str, passed: PassedOver) -> tuple[list[FoundFile], str]:
    """The files, and what is wrong if there are none."""
    if path.is_dir():
        files = _once(_walk(path, passed), passed)
        return files, f"the folder {shown(pattern)} has no files"
    if path.exists():
        if not path.is_file():
            raise DataError(
                f"{shown(pattern)} is neither a file nor a folder; name one that can be read again and again"
            )
        return [FoundFile(path, path.stat().st_size)], ""
    problem = f"there is no data set, file or folder called '{shown(pattern)}'"
    if "**" not in path.parts:
        return _once((Path(name) for name in glob.glob(str(path)) if Path(name).is_file()), passed), problem
    # `glob` would go round a loop of links many times.
    fixed = len(list(takewhile(lambda part: not glob.has_magic(part), path.parts)))
    start, wanted = Path(*path.parts[:fixed]), path.parts[fixed:]
    hidden = any(part.startswith(".") for part in wanted)
    found = (file for file in _walk(start, passed, hidden) if _fits(file.parts[len(start.parts) :], wanted))
    files = _once(found, passed)
    passed.hidden = 0  # no glob asks for them
    return files, problem


def _walk(root: Path, passed: PassedOver, hidden: bool = False) -> Iterator[Path]:
    """All files below `root`, those in linked folders last. Each folder is visited once."""
    folders, linked = deque([root]), deque[Path]()
    visited: set[tuple[int, int]] = set()
    while folders or linked:
        folder = (folders or linked).popleft()
        try:
            identity = _identity(folder.stat())
            names = sorted(os.listdir(folder))
        except OSError:
            passed.closed.append(str(folder))
            continue
        if identity in visited:
            passed.again += 1
            continue
        visited.add(identity)
        for name in names:
            path = folder / name
            kind = _kind_of(path)
            if name.startswith(".") and not hidden:
                passed.hidden += 1
            elif kind == "file":
                yield path
            elif kind == "folder":
                (linked if path.is_symlink() else folders).append(path)
            elif kind == "special":
                passed.special += 1
            elif os.path.islink(path):
                passed.broken += 1
            else:
                passed.closed.append(str(path))


def _kind_of(path: Path) -> Literal["file", "folder", "special"] | None:
    """What a path is, through links; None if that cannot be found out."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return None
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "special"


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _once(paths: Iterable[Path], passed: PassedOver) -> list[FoundFile]:
    """The files, sorted. Of several names of one file, the one that is no link is kept, then the shortest path."""
    names: dict[tuple[int, int], list[Path]] = {}
    sizes: dict[Path, int] = {}
    for path in paths:
        status = path.stat()
        names.setdefault(_identity(status), []).append(path)
        sizes[path] = status.st_size
    kept = [min(same, key=lambda path: (path.is_symlink(), len(path.parts), path)) for same in names.values()]
    passed.again += len(sizes) - len(kept)
    return [FoundFile(path, sizes[path]) for path in sorted(kept)]


def _fits(names: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the parts of a path fit those of a glob, in which ** stands for any number of folders."""
    if not wanted:
        return not names
    if wanted[0] == "**":
        if len(wanted) == 1:
            return bool(names) and not any(name.startswith(".") for name in names)
        return _fits(names, wanted[1:]) or (bool(names) and names[0][0] != "." and _fits(names[1:], wanted))
    return (
        bool(names)
        and (names[0][0] != "." or wanted[0][0] == ".")
        and fnmatchcase(names[0], wanted[0])
        and _fits(names[1:], wanted[1:])
    )


def _check_pointers(files: Sequence[FoundFile]) -> None:
    """Raises `DataError` for files that Git LFS or git-annex has put in place of the real ones."""
    pointers: dict[str, list[Path]] = {}
    for file in files:
        if file.size < 1024 and (command := _pointer(file.path)) is not None:
            pointers.setdefault(command, []).append(file.path)
    for command, paths in pointers.items():
        raise DataError(
            f"{len(paths):,} of {len(files):,} file(s) only point to the real ones ({shown(str(paths[0]))} …); get those with "
            f"'{command}' in the repository"
        )


def _pointer(path: Path) -> str | None:
    """The command that gets the real file, if this one only points to it."""
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError:
        return None  # said when it is read
    return next((command for begin, command in _POINTERS.items() if start.startswith(begin)), None)
