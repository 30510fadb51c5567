"""Data sets on the Hugging Face hub: listed once, then streamed shard by shard through a cache of bounded size."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from data.documents import AbstractSource, DataError, Shard
from data.files import read_documents
from data.hub_names import HubDataset
from data.splits import Splits, named_split

TRIES = 6
"""Maximum number of attempts at a request to the hub."""

FORMATS = (
    ("*.parquet",),
    ("*.jsonl.zst", "*.jsonl.gz", "*.json.gz", "*.jsonl", "*.ndjson"),
    ("*.json",),
    ("*.txt", "*.txt.gz"),
)
"""File formats in order of preference. The shards of a split are its files of the first format that it has."""

Result = TypeVar("Result")


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


class HubSource(AbstractSource):
    """A data set on the hub.

    Its files are listed at one commit, and later runs use the saved list. Files named as a validation or test split are never
    used for training. The validation split is the held-out text; without one, the test split is. A shard is looked up in the
    user's Hugging Face cache, then in the cache of this library, and is downloaded to the latter otherwise. The least recently
    used shards of the data set are deleted there to keep them below `cache_bytes`. HF_ENDPOINT, HF_TOKEN, HF_HOME and
    HF_HUB_OFFLINE are honoured.
    """

    def __init__(
        self,
        dataset: HubDataset,
        *,
        text_field: str,
        cache: Path | None = None,
        cache_bytes: int = 8 * 2**30,
        endpoint: str | None = None,
        wait: Callable[[float], None] = time.sleep,
        held_out: bool = False,
    ):
        """`cache`: the cache folder of this library, by default `caesura` in the user's cache folder. `wait` sleeps between
        attempts. `held_out`: read the held-out files, or all files if none is named as a held-out split."""
        root = default_cache() if cache is None else cache
        self._dataset = dataset
        self._text_field = text_field
        self._held_out = held_out
        part = (dataset.folder or "all") + (f"@{dataset.revision}" if dataset.revision else "")
        self._folder = root / "hub" / dataset.repository.replace("/", "--") / part.replace("/", "--")
        self._cache = cache
        self._cache_bytes = cache_bytes
        self._endpoint = endpoint
        self._wait = wait
        self._manifest: Manifest | None = None

    @property
    def name(self) -> str:
        return self._dataset.name

    @property
    def streamed(self) -> bool:
        return True

    @property
    def held_out_source(self) -> AbstractSource | None:
        dataset, name = self._dataset, f"{self.name} (held-out split)"
        if self._held_out:
            return None
        if dataset.held_out_repository is not None:
            dataset = HubDataset(name, dataset.held_out_repository, "", dataset.patterns, self._text_field)
        elif self._splits().held_out:
            dataset = dataclasses.replace(dataset, name=name)
        else:
            return None
        return HubSource(
            dataset,
            text_field=self._text_field,
            cache=self._cache,
            cache_bytes=self._cache_bytes,
            endpoint=self._endpoint,
            wait=self._wait,
            held_out=True,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        return self._splits().notes(self.name)

    def shards(self) -> Sequence[Shard]:
        splits, sizes = self._splits(), {file.path: file.size for file in self._load_manifest().files}
        files = splits.training
        if self._held_out:
            files = splits.held_out or splits.training
        elif not files:
            raise DataError(
                f"every file of {self.name} is named as a test or validation split ({splits.held_out[0]} …), which is never "
                "used for training; name a data set or a folder with others"
            )
        return [Shard(path, sizes[path]) for path in files]

    def _splits(self) -> Splits:
        return Splits.of(file.path for file in self._load_manifest().files)

    def documents(self, shard: Shard) -> Iterator[bytes]:
        file = next(file for file in self._load_manifest().files if file.path == shard.name)
        return read_documents(self._local(file), self._text_field)

    def _load_manifest(self) -> Manifest:
        if self._manifest is None:
            path = self._folder / "manifest.json"
            if path.exists():
                self._manifest = _read_manifest(path)
            else:
                self._manifest = self._cached_manifest() if constants.HF_HUB_OFFLINE else self._remote_manifest()
                if not constants.HF_HUB_OFFLINE:  # offline, the cached files are not the full list
                    self._folder.mkdir(parents=True, exist_ok=True)
                    _write_manifest(path, self._manifest)
        return self._manifest

    def _remote_manifest(self) -> Manifest:
        api = HfApi(endpoint=self._endpoint)
        repository, folder, revision = self._dataset.repository, self._dataset.folder, self._dataset.revision or None
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

        def list_files() -> Manifest:
            commit = api.dataset_info(repository, revision=revision, timeout=10).sha
            if commit is None:
                raise DataError(f"the hub reports no commit of {repository}, so its files cannot be pinned")
            tree = api.list_repo_tree(repository, folder or None, recursive=True, revision=commit, repo_type="dataset")
            files = tuple(
                RemoteFile(entry.path, entry.size, None if entry.lfs is None else entry.lfs.sha256)
                for entry in tree
                if isinstance(entry, RepoFile)
            )
            return Manifest(repository, commit, files)

        manifest = self._retry("list its files", list_files)
        return self._with_shards_only(manifest)

    def _cached_manifest(self) -> Manifest:
        """The shards in the user's Hugging Face cache, for offline use of a data set that was never listed."""
        root = Path(constants.HF_HUB_CACHE) / f"datasets--{self._dataset.repository.replace('/', '--')}"
        snapshots = sorted((root / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
        revision = self._dataset.revision
        if revision:
            named = root / "refs" / revision
            commit = named.read_text().strip() if named.is_file() else revision
            snapshots = [path for path in snapshots if path.name == commit]
        if not snapshots:
            cached = f"of its revision {revision} " if revision else ""
            raise self._unreachable(
                "list its files", f"offline mode is on (HF_HUB_OFFLINE) and no file of it {cached}is cached"
            )
        newest = snapshots[-1]
        paths = sorted(path for path in newest.rglob("*") if path.is_file())
        files = tuple(RemoteFile(path.relative_to(newest).as_posix(), path.stat().st_size, None) for path in paths)
        folder = f"{self._dataset.folder}/" if self._dataset.folder else ""
        inside = tuple(file for file in files if file.path.startswith(folder))
        return self._with_shards_only(Manifest(self._dataset.repository, newest.name, inside))

    def _with_shards_only(self, manifest: Manifest) -> Manifest:
        """The manifest with only the files of each split's preferred format. Raises `DataError` if there are none."""
        by_split: dict[str, list[RemoteFile]] = {}
        for file in manifest.files:
            by_split.setdefault(named_split(file.path) or "training", []).append(file)
        chosen = [file for files in by_split.values() for file in self._of_one_format(files)]
        if chosen:
            return dataclasses.replace(manifest, files=tuple(sorted(chosen, key=lambda file: file.path)))
        wanted = ", ".join(self._dataset.patterns or [pattern for patterns in FORMATS for pattern in patterns])
        inside = f"in {self._dataset.folder} " if self._dataset.folder else ""
        raise DataError(f"{manifest.repository} on the hub has no files {inside}like {wanted}")

    def _of_one_format(self, files: Sequence[RemoteFile]) -> list[RemoteFile]:
        """The files of the first preferred format that occurs among `files`."""
        for patterns in (self._dataset.patterns,) if self._dataset.patterns else FORMATS:
            chosen = [file for file in files if any(fnmatch.fnmatch(file.path, pattern) for pattern in patterns)]
            if chosen:
                return chosen
        return []

    def _local(self, file: RemoteFile) -> Path:
        """The local path of a shard, downloaded if necessary."""
        manifest = self._load_manifest()
        user_cached = try_to_load_from_cache(
            manifest.repository, file.path, repo_type="dataset", revision=manifest.commit
        )
        if isinstance(user_cached, str) and os.path.getsize(user_cached) == file.size:
            return Path(user_cached)
        local = self._folder / file.path
        if local.exists() and local.stat().st_size == file.size:
            os.utime(local)
            return local
        if constants.HF_HUB_OFFLINE:
            raise self._unreachable(
                f"read {file.path}", "offline mode is on (HF_HUB_OFFLINE) and this shard is not cached"
            )
        local.unlink(missing_ok=True)
        self._evict_for(file)

        def download() -> Path:
            try:
                path = Path(
                    hf_hub_download(
                        manifest.repository,
                        file.path,
                        repo_type="dataset",
                        revision=manifest.commit,
                        local_dir=self._folder,
                        endpoint=self._endpoint,
                    )
                )
                _check_download(path, file)
            except BaseException:
                local.unlink(missing_ok=True)
                raise
            return path

        return self._retry(f"download {file.path}", download)

    def _evict_for(self, file: RemoteFile) -> None:
        """Deletes the least recently used shards until `file` fits. Raises `DataError` if it is larger than the cache."""
        if file.size > self._cache_bytes:
            raise DataError(
                f"{file.path} of {self.name} has {file.size / 2**30:.2f} GiB, more than the cache may hold; raise "
                f"--data.cache-gib above {self._cache_bytes / 2**30:.2f}"
            )
        hidden = self._folder / ".cache"
        shards = sorted(
            (path for path in self._folder.rglob("*") if path.is_file() and hidden not in path.parents),
            key=lambda path: path.stat().st_mtime,
        )
        shards = [path for path in shards if path.name != "manifest.json"]
        size = sum(path.stat().st_size for path in shards)
        for path in shards:
            if size + file.size <= self._cache_bytes:
                return
            size -= path.stat().st_size
            path.unlink(missing_ok=True)

    def _retry(self, what: str, action: Callable[[], Result]) -> Result:
        """The result of `action`, with exponential backoff after transient failures.

        Raises `DataError` after `TRIES` attempts or after a permanent failure.
        """
        for attempt in range(TRIES):
            try:
                return action()
            except (OSError, httpx2.HTTPError, ValueError, RuntimeError) as error:
                reason = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
                if attempt + 1 == TRIES or not _is_transient(reason):
                    raise self._unreachable(what, _explain(reason)) from error
                self._wait(2.0**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _unreachable(self, what: str, why: str) -> DataError:
        endpoint = self._endpoint or constants.ENDPOINT
        return DataError(
            f"cannot {what} for the data set {self.name} ({self._dataset.repository} at {endpoint}): {why}. No other data "
            "set is substituted; data sets that need no network are docs, stdlib, or the path of your own files"
        )


def _check_download(path: Path, file: RemoteFile) -> None:
    size = path.stat().st_size
    if size != file.size:
        raise OSError(f"it arrived with {size} bytes instead of {file.size}")
    if file.sha256 is not None:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != file.sha256:
            raise OSError("its contents do not match the hub's checksum")


def _is_transient(error: BaseException) -> bool:
    """Whether a failure may be transient: a network or server error, but not a client error or an error of the disk."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    if isinstance(error, OfflineModeIsEnabled | ValueError):
        return False
    # The client raises an OSError without errno for a download of the wrong size. The operating system sets errno.
    transient = httpx2.TransportError | ConnectionError | TimeoutError | RuntimeError
    return isinstance(error, transient) or (isinstance(error, OSError) and error.errno is None)


def _explain(error: BaseException) -> str:
    if isinstance(error, GatedRepoError):
        return "access is granted only to users who asked for it: accept its terms on the hub and set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private and HF_TOKEN is not set"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, EntryNotFoundError):
        return "it has no such folder or file"
    if isinstance(error, HfHubHTTPError):
        return f"the hub answered {error.response.status_code}"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def default_cache() -> Path:
    """The cache folder of this library, `caesura` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "caesura"


def _read_manifest(path: Path) -> Manifest:
    try:
        values = json.loads(path.read_text())
        files = tuple(RemoteFile(**file) for file in values["files"])
        return Manifest(values["repository"], values["commit"], files)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged ({error}); delete it, and the shards are listed again") from None


def _write_manifest(path: Path, manifest: Manifest) -> None:
    values = {**vars(manifest), "files": [vars(file) for file in manifest.files]}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=1))
    temporary.replace(path)
