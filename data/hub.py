"""Data sets on the Hugging Face hub: listed once, then streamed shard by shard through a cache of bounded size."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import WeakFileLock

from data.documents import AbstractSource, DataError, Extent, Shard
from data.files import read_documents
from data.hub_manifest import (
    MANIFEST,
    MOST_FILES,
    Manifest,
    RemoteFile,
    check_files,
    checked_commit,
    read_manifest,
    remote_file,
    write_manifest,
)
from data.hub_names import HubDataset
from data.hub_requests import PATIENCE, RequestError, request
from data.left_out import LeftOut
from data.splits import Part, Splits, named_split

FORMATS = (
    ("*.parquet",),
    ("*.jsonl.zst", "*.jsonl.gz", "*.json.gz", "*.jsonl", "*.ndjson"),
    ("*.json",),
    ("*.txt", "*.txt.gz"),
)
"""File formats in order of preference. The shards of a split are its files of the first format that it has."""

Result = TypeVar("Result")


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
        patience: float = PATIENCE,
        part: Part = "training",
    ):
        """`cache`: the cache folder of this library, by default `caesura` in the user's cache folder. `wait` sleeps between
        attempts; a request ends after `patience` seconds in which nothing arrives. `part`: the files that are read; the
        held-out text that is a data set of its own has all its files where none is named as a held-out split."""
        root = default_cache() if cache is None else cache
        self._dataset = dataset
        self._text_field = text_field
        self._part: Part = part
        of = (dataset.folder or "all") + (f"@{dataset.revision}" if dataset.revision else "")
        self._folder = root / "hub" / dataset.repository.replace("/", "--") / of.replace("/", "--")
        self._cache = cache
        self._cache_bytes = cache_bytes
        self._endpoint = endpoint
        self._wait = wait
        self._patience = patience
        self._manifest: Manifest | None = None
        self._left_out = LeftOut()

    @property
    def name(self) -> str:
        return self._dataset.name

    @property
    def streamed(self) -> bool:
        return True

    @property
    def held_out_source(self) -> AbstractSource | None:
        dataset = self._dataset
        if self._part == "training" and dataset.held_out_repository is not None:
            name = f"{self.name} (held-out split)"
            return self._source(
                HubDataset(name, dataset.held_out_repository, "", dataset.patterns, self._text_field), "held-out"
            )
        return self._other("held-out")

    @property
    def test_source(self) -> AbstractSource | None:
        return self._other("test")

    def _other(self, part: Part) -> AbstractSource | None:
        """The source of another part of the same data set; None where no file is named so."""
        if self._part != "training" or not self._splits().of_part(part):
            return None
        return self._source(dataclasses.replace(self._dataset, name=f"{self.name} ({part} split)"), part)

    def _source(self, dataset: HubDataset, part: Part) -> AbstractSource:
        source = HubSource(
            dataset,
            text_field=self._text_field,
            cache=self._cache,
            cache_bytes=self._cache_bytes,
            endpoint=self._endpoint,
            wait=self._wait,
            patience=self._patience,
            part=part,
        )
        source._left_out = self._left_out  # what is left out of either part is said once
        return source

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self._splits().notes(self.name), *self._left_out.notes(self.name))

    def extents(self) -> Sequence[Extent]:
        return [Extent(f"hub:{self._dataset.repository}/{shard.name}") for shard in self.shards()]

    def shards(self) -> Sequence[Shard]:
        splits, sizes = self._splits(), {file.path: file.size for file in self._load_manifest().files}
        files = splits.of_part(self._part)
        if self._part == "held-out":
            files = files or splits.training
        elif self._part == "training" and not files:
            raise DataError(
                f"every file of {self.name} is named as a test or validation split ({splits.held_out[0]} …), which is never "
                "used for training; name a data set or a folder with others"
            )
        return [Shard(path, sizes[path]) for path in files]

    def _splits(self) -> Splits:
        return Splits.of(file.path for file in self._load_manifest().files)

    def documents(self, shard: Shard) -> Iterator[bytes]:
        file = next(file for file in self._load_manifest().files if file.path == shard.name)
        yield from read_documents(self._local(file), self._text_field, self._left_out.of(f"{self.name} {shard.name}"))

    def _load_manifest(self) -> Manifest:
        if self._manifest is None:
            path = self._folder / MANIFEST
            if path.exists():
                self._manifest = read_manifest(path, self._dataset.repository)
            else:
                self._manifest = self._cached_manifest() if constants.HF_HUB_OFFLINE else self._remote_manifest()
                if not constants.HF_HUB_OFFLINE:  # offline, the cached files are not the full list
                    self._folder.mkdir(parents=True, exist_ok=True)
                    write_manifest(path, self._manifest)
        return self._manifest

    def _remote_manifest(self) -> Manifest:
        api = HfApi(endpoint=self._endpoint)
        repository, folder, revision = self._dataset.repository, self._dataset.folder, self._dataset.revision or None
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

        def list_files() -> Manifest:
            commit = checked_commit(api.dataset_info(repository, revision=revision, timeout=10).sha)
            tree = api.list_repo_tree(repository, folder or None, recursive=True, revision=commit, repo_type="dataset")
            files: list[RemoteFile] = []
            for number, entry in enumerate(tree):
                if isinstance(entry, RepoFile):
                    files.append(remote_file(entry.path, entry.size, None if entry.lfs is None else entry.lfs.sha256))
                if number > MOST_FILES:
                    raise ValueError(f"it lists more than {MOST_FILES:,} files and folders")
            return Manifest(repository, commit, tuple(files))

        return self._with_shards_only(self._request("list its files", list_files))

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
            try:
                check_files(chosen)
            except ValueError as error:
                raise DataError(f"the files of {manifest.repository} on the hub cannot be used: {error}") from None
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
        if _has(local, file):
            os.utime(local)
            return local
        if constants.HF_HUB_OFFLINE:
            raise self._unreachable(
                f"read {file.path}", "offline mode is on (HF_HUB_OFFLINE) and this shard is not cached"
            )
        self._check_fits(file)
        arriving, locks = self._folder / ".cache" / "arriving", self._folder / ".cache" / "locks"
        lock = locks / hashlib.blake2b(file.path.encode(), digest_size=16).hexdigest()

        def download() -> Path:
            locks.mkdir(parents=True, exist_ok=True)
            # Worker processes of a run read the same shards at the same time: the others wait for the first.
            with WeakFileLock(lock):
                if _has(local, file):
                    os.utime(local)
                    return local
                # Only now: no shard goes for one that another process has made room for.
                local.unlink(missing_ok=True)
                self._evict_for(file, local)
                return downloaded()

        def downloaded() -> Path:
            repository, commit = manifest.repository, manifest.commit
            path = Path(
                hf_hub_download(
                    repository,
                    file.path,
                    repo_type="dataset",
                    revision=commit,
                    local_dir=arriving,
                    endpoint=self._endpoint,
                )
            )
            try:
                _check_download(path, file)
                local.parent.mkdir(parents=True, exist_ok=True)
                path.replace(local)  # in one step, and only once it is checked
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            return local

        return self._request(f"download {file.path}", download, lambda: _size_of(arriving))

    def _check_fits(self, file: RemoteFile) -> None:
        """Raises `DataError` if `file` is larger than the cache."""
        if file.size > self._cache_bytes:
            raise DataError(
                f"{file.path} of {self.name} has {file.size / 2**30:.2f} GiB, more than the cache may hold; raise "
                f"--data.cache-gib above {self._cache_bytes / 2**30:.2f}"
            )

    def _evict_for(self, file: RemoteFile, local: Path) -> None:
        """Deletes the least recently used shards until `file` fits, which will be at `local`."""
        kept = sorted((one for one in self._kept() if one[1].name != str(local)), key=lambda one: one[0])
        size = sum(shard.size for _, shard in kept)
        for _, shard in kept:
            if size + file.size <= self._cache_bytes:
                return
            size -= shard.size
            Path(shard.name).unlink(missing_ok=True)

    def _kept(self) -> list[tuple[float, Shard]]:
        """The shards in the cache of this library, each with the time of its last use."""
        kept: list[tuple[float, Shard]] = []
        hidden = self._folder / ".cache"
        for path in self._folder.rglob("*"):
            own = hidden in path.parents or (
                path.parent == self._folder and path.name.startswith(f"{Path(MANIFEST).stem}.")
            )
            if not own and (status := _status(path)) is not None:
                kept.append((status.st_mtime, Shard(str(path), status.st_size)))
        return kept

    def _request(self, what: str, action: Callable[[], Result], arrived: Callable[[], int] = lambda: 0) -> Result:
        """The result of `action`. Raises `DataError` if it fails for good, or takes too long."""
        try:
            return request(action, self._wait, patience=self._patience, arrived=arrived)
        except RequestError as error:
            raise self._unreachable(what, str(error)) from error

    def _unreachable(self, what: str, why: str) -> DataError:
        endpoint = self._endpoint or constants.ENDPOINT
        return DataError(
            f"cannot {what} for the data set {self.name} ({self._dataset.repository} at {endpoint}): {why}. No other data "
            "set is substituted; data sets that need no network are docs, stdlib, or the path of your own files"
        )


def _status(path: Path) -> os.stat_result | None:
    """The status of a file; None if there is none, since another process may have moved or deleted it."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _has(path: Path, file: RemoteFile) -> bool:
    """Whether `path` is the whole of `file`."""
    status = _status(path)
    return status is not None and status.st_size == file.size


def _size_of(folder: Path) -> int:
    """The bytes of the unfinished downloads of a folder."""
    return sum(status.st_size for path in folder.rglob("*.incomplete") if (status := _status(path)) is not None)


def _check_download(path: Path, file: RemoteFile) -> None:
    status = _status(path)
    if status is None:
        raise OSError("another process has taken it")
    size = status.st_size
    if size != file.size:
        raise OSError(f"it arrived with {size} bytes instead of {file.size}")
    if file.sha256 is not None:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != file.sha256:
            raise OSError("its contents do not match the hub's checksum")


def default_cache() -> Path:
    """The cache folder of this library, `caesura` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "caesura"
