"""Documents in local files: plain text, JSON lines, Parquet and FASTA, compressed or not."""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data.documents import AbstractSource, DataError, Shard, checked_utf8
from data.fasta import SUFFIXES, read_fasta
from data.splits import Splits

JSON_LINES = (".jsonl", ".json", ".ndjson")

PLAIN_DOCUMENT = 64 * 1024
"""A longer plain text file is split at line ends into documents of about this many bytes."""


class Files(AbstractSource):
    """Local files, given by a path, a folder (all files in it, at any depth, except hidden ones) or a glob.

    `.jsonl`, `.json` and `.ndjson` have one JSON object per line, `.parquet` one record per document; the text is in
    `text_field`. `.fa`, `.fasta` and `.fna` have nucleotide sequences. Every other file is plain text: one document, or several
    if it is long. All may be compressed (`.gz`, `.zst`). The files are streamed if they have more than `memory_limit` bytes
    together. JSON and Parquet files named as a validation split are the held-out text; without one, those of a test split are.
    """

    def __init__(self, pattern: str, text_field: str, memory_limit: int = 512 * 2**20, *, held_out: bool = False):
        """`held_out`: read the held-out files instead of the training files. Raises `DataError` if nothing matches."""
        self._pattern = pattern
        self._text_field = text_field
        self._memory_limit = memory_limit
        self._held_out = held_out
        paths = _matches(pattern)
        self._splits = _splits_of(paths)
        chosen = self._splits.held_out if held_out else self._splits.training
        self._shards = [Shard(str(path), path.stat().st_size) for path in paths if str(path) in chosen]
        self._skipped_bases: dict[str, int] = {}

    @property
    def name(self) -> str:
        return f"{self._pattern} (held-out split)" if self._held_out else self._pattern

    @property
    def streamed(self) -> bool:
        return sum(shard.size for shard in self._shards) > self._memory_limit

    @property
    def held_out_source(self) -> AbstractSource | None:
        if self._held_out or not self._splits.held_out:
            return None
        return Files(self._pattern, self._text_field, self._memory_limit, held_out=True)

    @property
    def notes(self) -> tuple[str, ...]:
        notes = self._splits.notes(self.name)
        if skipped := sum(self._skipped_bases.values()):
            notes += (f"{skipped:,} unknown bases and gaps (N, ., -, *) of {self.name} were skipped so far",)
        return notes

    def shards(self) -> Sequence[Shard]:
        return self._shards

    def documents(self, shard: Shard) -> Iterator[bytes]:
        self._skipped_bases[shard.name] = 0

        def on_skipped(bases: int) -> None:
            self._skipped_bases[shard.name] += bases

        return read_documents(Path(shard.name), self._text_field, on_skipped)


def read_documents(
    path: Path, text_field: str, on_skipped: Callable[[int], None] = lambda bases: None
) -> Iterator[bytes]:
    """The documents of one file, in order, without empty ones. `on_skipped` is called with the numbers of bases skipped in FASTA
    files.

    Raises `DataError`, with the file and the position in it, for invalid content.
    """
    kind = _kind(path)
    try:
        if kind == ".parquet":
            yield from _parquet_documents(path, text_field)
        elif kind in JSON_LINES:
            yield from _json_documents(path, text_field)
        elif kind in SUFFIXES:
            with open_stream(path) as stream:
                yield from read_fasta(stream, str(path), on_skipped)
        else:
            yield from _plain_documents(path)
    except (OSError, EOFError, zlib.error, *_zstd_errors()) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _kind(path: Path) -> str:
    """The file suffix without the compression suffix, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in (".gz", ".zst") else (suffixes or [""])[-1]


def _splits_of(paths: Sequence[Path]) -> Splits:
    """The splits named by the paths of JSON and Parquet files, relative to the common folder of all files. Other files are for
    training, since source code has tests too. All files are for training if none would be left otherwise."""
    all_for_training = Splits(tuple(str(path) for path in paths))
    if len(paths) == 1:
        return all_for_training
    root = Path(os.path.commonpath(paths))
    splits = Splits.of(path.relative_to(root).as_posix() for path in paths if _kind(path) in (".parquet", *JSON_LINES))
    not_for_training = {str(root / name) for name in (*splits.held_out, *splits.unused)}
    training = tuple(path for path in all_for_training.training if path not in not_for_training)
    if not training:
        return all_for_training
    return Splits(training, *(tuple(str(root / name) for name in part) for part in (splits.held_out, splits.unused)))


def _zstd_errors() -> tuple[type[Exception], ...]:
    try:
        import zstandard
    except ImportError:
        return ()
    return (zstandard.ZstdError,)


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
        problem = f"the folder {pattern} holds no files"
    elif path.exists():
        return [path]
    else:
        files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        problem = f"there is no data set, file or folder called {pattern!r}"
    if not files:
        raise DataError(
            f"{problem}; use docs, stdlib, codeparrot, codeparrot-clean, fineweb, fineweb-edu, fineweb-100BT, "
            "fineweb-edu-100BT, hub:owner/name/folder@revision, or the path of a file, a folder or a glob"
        )
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def open_stream(path: Path) -> io.BufferedReader:
    """The content of a file, decompressed (`.gz`, `.zst`)."""
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path))
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{path} needs the package zstandard: pip install 'caesura-lm[zstd]'") from None
        return io.BufferedReader(zstandard.open(path, "rb"))
    return path.open("rb")


def _plain_documents(path: Path) -> Iterator[bytes]:
    with open_stream(path) as stream:
        lines: list[bytes] = []
        size = offset = 0
        for line in stream:
            lines.append(checked_utf8(line, f"{path} (the line that starts at byte {offset})"))
            size += len(line)
            offset += len(line)
            if size >= PLAIN_DOCUMENT:
                yield b"".join(lines)
                lines, size = [], 0
        if lines:
            yield b"".join(lines)


def _json_documents(path: Path, text_field: str) -> Iterator[bytes]:
    with open_stream(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}, is not JSON ({error})") from None
            yield from _text_of(record, text_field, f"{path}, line {number},")


def _text_of(record: object, text_field: str, where: str) -> Iterator[bytes]:
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        fields = ", ".join(sorted(map(str, record))) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise DataError(f"{where} has no text field {text_field!r}: it has {fields}; name one with --data.text-field")
    try:
        text = record[text_field].encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} has half of a surrogate pair, which UTF-8 cannot encode") from None
    if text:
        yield text


def _parquet_documents(path: Path, text_field: str) -> Iterator[bytes]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path} needs the package pyarrow: pip install 'caesura-lm[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if text_field not in table.schema_arrow.names:
                fields = ", ".join(table.schema_arrow.names)
                raise DataError(
                    f"{path} has no text field {text_field!r}: it has {fields}; name one with --data.text-field"
                )
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    yield from _text_of({text_field: value}, text_field, f"{path}, row {row},")
                    row += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"cannot read {path}: {error}") from error
