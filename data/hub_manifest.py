"""The list of a data set's files on the hub, checked wherever it comes from: the hub's answer, or a file that keeps it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from data.documents import DataError, shown

MANIFEST = "manifest.json"
"""The name of the saved list in the folder of the cached shards."""

MOST_FILES = 1_000_000
"""A data set with more files is refused."""

_RESERVED = (".cache", MANIFEST)
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\\\\]")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its path, its size in bytes, and its SHA-256 if the hub has one."""

    path: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Manifest:
    """The shards of a data set at one commit. It is saved beside the cached shards, so that later runs read the same data."""

    repository: str
    commit: str
    files: tuple[RemoteFile, ...]


def remote_file(path: object, size: object, sha256: object) -> RemoteFile:
    """A file of a repository. Raises `ValueError` for values of other types, and for what no file can have."""
    if not isinstance(path, str) or not path:
        raise ValueError(f"{shown(repr(path))} is no path of a file")
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 2**63:
        raise ValueError(f"the size of {shown(path)} is {shown(repr(size))}")
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
        raise ValueError(f"the SHA-256 of {shown(path)} is {shown(repr(sha256))}")
    return RemoteFile(path, size, sha256)


def checked_commit(commit: object) -> str:
    """A commit. Raises `ValueError` for anything but letters and digits."""
    if not isinstance(commit, str) or not re.fullmatch("[0-9A-Za-z]{1,64}", commit):
        raise ValueError(f"{shown(repr(commit))} is no commit")
    return commit


def check_files(files: Sequence[RemoteFile]) -> None:
    """Raises `ValueError` unless every file can be kept in the cache: in its folder, and apart from the library's own files."""
    if len(files) > MOST_FILES:
        raise ValueError(f"it has more than {MOST_FILES:,} files")
    seen: set[str] = set()
    for path in (file.path for file in files):
        parts = path.split("/")
        if any(part in ("", ".", "..") for part in parts) or _UNSAFE.search(path) or PureWindowsPath(path).drive:
            raise ValueError(f"the file name '{shown(path)}' leads out of the data set, or has unsafe characters")
        if parts[0].casefold() in _RESERVED:
            raise ValueError(
                f"the file name '{shown(path)}' is one that the cache uses itself; name a folder of the data set"
            )
        if path in seen:
            raise ValueError(f"it has '{shown(path)}' twice")
        seen.add(path)


def read_manifest(path: Path, repository: str) -> Manifest:
    """The saved list of the data set `repository`. Raises `DataError` if it is damaged."""
    try:
        values = json.loads(path.read_bytes())
        files = tuple(remote_file(**file) for file in values["files"])
        check_files(files)
        if not files or values["repository"] != repository:
            raise ValueError("it lists no files" if not files else f"it is that of {shown(repr(values['repository']))}")
        return Manifest(repository, checked_commit(values["commit"]), files)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); delete it, and the shards are listed again") from None


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Saves the list, in one step even if other processes do the same."""
    values = {**vars(manifest), "files": [vars(file) for file in manifest.files]}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("w") as stream:
            json.dump(values, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
