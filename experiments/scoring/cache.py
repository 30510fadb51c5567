"""What was computed once is kept: the scores of each chunk of a text, by model, text and settings."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.hub import default_cache
from experiments.config.errors import ConfigError
from experiments.evaluation.windows import PositionScores, Window, positions_of

FORMAT = 3
"""To be raised whenever the same model, text and settings would give other scores."""


def default_folder() -> Path:
    """Where scores are kept unless a command says otherwise."""
    return default_cache() / "evaluation"


def chunk_key(
    model: str, documents: Sequence[bytes], windows: Sequence[Window], drawn: tuple[int, int] | None, context: int
) -> str:
    """The name of the scores of some windows: a hash of everything that they depend on but rounding. `model` is the hash of the
    model, `drawn` the seed and the number of the sample (None: greedy)."""
    settings = [FORMAT, model, context, drawn]
    # The number of a document and of a window decide only what is drawn.
    numbers = [(window.document, window.number) if drawn else () for window in windows]
    places = [(window.start, window.counted, window.stop, len(documents[window.document])) for window in windows]
    digest = hashlib.sha256(json.dumps([settings, numbers, places]).encode())
    for window in windows:
        digest.update(positions_of(documents[window.document], window.start, window.stop + 1).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class ScoreCache:
    """A folder of scores, one file a chunk, each written whole or not at all; or none, if `folder` is None. The files used
    longest ago are deleted to keep it below `limit` bytes."""

    folder: Path | None
    limit: int = 2 * 2**30

    def check(self) -> None:
        """Make the folder. Raises `ConfigError` where that is impossible."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ConfigError(
                f"the cache folder {self.folder} cannot be written to ({error.strerror}): name another --cache, or --no-keep"
            ) from None

    def read(self, key: str, positions: int) -> PositionScores | None:
        """The scores of that name, if they are there and whole."""
        arrays = self.read_arrays(key, tuple(PositionScores.__annotations__))
        if arrays is None or any(array.shape[:1] != (positions,) for array in arrays.values()):
            return None
        return PositionScores(**arrays)

    def write(self, key: str, scores: PositionScores) -> None:
        """Keep scores under that name. Raises `ConfigError` where the disk refuses."""
        self.write_arrays(key, vars(scores))

    def read_arrays(self, key: str, names: Sequence[str]) -> dict[str, np.ndarray] | None:
        """The arrays of that name, if they are there and whole."""
        if self.folder is None:
            return None
        path = self.folder / f"{key}.npz"
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in names}
            os.utime(path)
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile):
            # Damaged in whatever way: it is computed again.
            return None
        return arrays

    def write_arrays(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays under that name. Raises `ConfigError` where the disk refuses."""
        if self.folder is None:
            return
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)  # pyrefly: ignore[bad-argument-type] -- no array is called allow_pickle
        try:
            # Another process may write the same file.
            descriptor, name = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".tmp")
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    stream.write(content.getvalue())
                os.replace(name, self.folder / f"{key}.npz")
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise ConfigError(
                f"the cache folder {self.folder} cannot be written to ({error.strerror}): name another --cache, or --no-keep"
            ) from None

    def evict(self) -> None:
        """Delete the files that were used longest ago until the others are within the limit."""
        if self.folder is None:
            return
        files = []
        for path in self.folder.glob("*.npz"):
            try:
                files.append((path.stat().st_mtime, path.stat().st_size, path))
            except FileNotFoundError:
                continue
        size = sum(one for _, one, _ in files)
        for _, one, path in sorted(files):
            if size <= self.limit:
                return
            path.unlink(missing_ok=True)
            size -= one
