"""Documents in local files: plain text, JSON lines, Parquet and FASTA, compressed or not."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from data.compression import COMPRESSED, open_text, read_errors, text_size
from data.documents import AbstractSource, DataError, Extent, Shard, shown
from data.fasta import SUFFIXES, read_fasta
from data.json_lines import JSON_LINES, json_documents
from data.left_out import Count, LeftOut, ignored
from data.parquet import parquet_documents, text_bytes
from data.paths import find_files
from data.plain import PLAIN_DOCUMENT, plain_documents
from data.splits import Part, Splits

SMALL = 2 * 2**20
"""A data set that is one plain text file of fewer bytes is split into shorter documents, so that some can be held out: about 32
of at least 4096 bytes, which the usual rows have, or else about 8 of at least 64 bytes."""


class Files(AbstractSource):
    """Local files, given by a path, a folder (all files in it, at any depth, except hidden ones) or a glob.

    `.jsonl`, `.json` and `.ndjson` have one JSON object per line, `.parquet` one record per document; the text is in
    `text_field`. `.fa`, `.fasta` and `.fna` have nucleotide sequences. Every other file is plain text: one document, or several
    if it is long. All may be compressed (`.gz`, `.zst`). The files are streamed if they have more than `memory_limit` bytes
    together, after decompression. JSON and Parquet files named as a validation split are the held-out text; without one, those
    of a test split are. Those of a test split are the test text.
    """

    def __init__(self, pattern: str, text_field: str, memory_limit: int = 512 * 2**20, *, part: Part = "training"):
        """`part`: the files that are read. Raises `DataError` if nothing matches."""
        self._pattern = pattern
        self._text_field = text_field
        self._memory_limit = memory_limit
        self._part: Part = part
        files, self._passed_over = find_files(pattern)
        self._splits = _splits_of([file.path for file in files])
        chosen = self._splits.of_part(part)
        self._shards = [Shard(str(file.path), file.size) for file in files if str(file.path) in chosen]
        self._left_out = LeftOut()

    @property
    def name(self) -> str:
        return shown(self._pattern) if self._part == "training" else f"{shown(self._pattern)} ({self._part} split)"

    @cached_property
    def streamed(self) -> bool:
        """Whether the files have more than `memory_limit` bytes. Compressed ones are decompressed to find out, up to that."""
        size = sum(shard.size for shard in self._shards)
        for shard in self._shards:
            if size > self._memory_limit:
                return True
            # What comes out of a compressed file may be a thousand times what it stores.
            size += self._expanded(shard, self._memory_limit - size + shard.size) - shard.size
        return size > self._memory_limit

    @property
    def held_out_source(self) -> AbstractSource | None:
        return self._other("held-out")

    @property
    def test_source(self) -> AbstractSource | None:
        return self._other("test")

    def _other(self, part: Part) -> AbstractSource | None:
        """The source of another part; None where no file is named so."""
        if self._part != "training" or not self._splits.of_part(part):
            return None
        source = Files(self._pattern, self._text_field, self._memory_limit, part=part)
        source._left_out = self._left_out  # what is left out of either part is said once
        return source

    @property
    def notes(self) -> tuple[str, ...]:
        small = ()
        if self._document_size < min(PLAIN_DOCUMENT, self._only_text):
            small = (
                f"{self.name} is one small file: it is split into documents of about {self._document_size:,} bytes, some of "
                "which are held out",
            )
        found = self._passed_over.note(self.name)
        return (*self._splits.notes(self.name), *small, *found, *self._left_out.notes(self.name))

    def extents(self) -> Sequence[Extent]:
        return [Extent(str(Path(shard.name).resolve())) for shard in self.shards()]

    def shards(self) -> Sequence[Shard]:
        return self._shards

    def documents(self, shard: Shard) -> Iterator[bytes]:
        return read_documents(Path(shard.name), self._text_field, self._left_out.of(shard.name), self._document_size)

    @property
    def _document_size(self) -> int:
        """The bytes after which a document of plain text ends. Without line ends, it has up to twice as many."""
        size = self._only_text
        return max(size // 32, min(4096, size // 8), 64) if 0 < size < SMALL else PLAIN_DOCUMENT

    @cached_property
    def _only_text(self) -> int:
        """The bytes of the only file of plain text, or a number from `SMALL` on if it has more; 0 if there are several files, or
        the file is of another kind."""
        if len(self._shards) != 1 or _kind(Path(self._shards[0].name)) in (".parquet", *JSON_LINES, *SUFFIXES):
            return 0
        return self._expanded(self._shards[0], SMALL)

    def _expanded(self, shard: Shard, at_most: int) -> int:
        """The bytes of a file after decompression, or a number above `at_most`; of a Parquet file, those of its texts."""
        path = Path(shard.name)
        try:
            return (
                text_bytes(path, self._text_field, at_most) if _kind(path) == ".parquet" else text_size(path, at_most)
            )
        except read_errors() as error:
            raise DataError(f"cannot read {path}: {error}") from error


def read_documents(
    path: Path, text_field: str, count: Count = ignored, plain_size: int = PLAIN_DOCUMENT
) -> Iterator[bytes]:
    """The documents of one file, in order, without empty ones.

    `count` counts what is left out or worth a note. `plain_size`: the bytes after which a document of plain text ends at a line
    end. Raises `DataError`, with the file and the position in it, for invalid content.
    """
    for document in _read(path, text_field, count, plain_size):
        if b"\0" in document:
            count("NUL", 1)
        if document:
            yield document


def _read(path: Path, text_field: str, count: Count, plain_size: int) -> Iterator[bytes]:
    kind = _kind(path)
    try:
        if kind == ".parquet":
            yield from parquet_documents(path, text_field, count)
            return
        with open_text(path) as stream:
            if kind in JSON_LINES:
                yield from json_documents(stream, str(path), text_field, count)
            elif kind in SUFFIXES:
                yield from read_fasta(stream, str(path), count)
            else:
                yield from plain_documents(stream, str(path), plain_size)
    except read_errors() as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _kind(path: Path) -> str:
    """The file suffix without the compression suffix, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in COMPRESSED else (suffixes or [""])[-1]


def _splits_of(paths: Sequence[Path]) -> Splits:
    """The splits named by the paths of JSON and Parquet files, relative to the common folder of all files. Other files are for
    training, since source code has tests too. All files are for training if none would be left otherwise."""
    all_for_training = Splits(tuple(str(path) for path in paths))
    if len(paths) == 1:
        return all_for_training
    root = Path(os.path.commonpath(paths))
    splits = Splits.of(path.relative_to(root).as_posix() for path in paths if _kind(path) in (".parquet", *JSON_LINES))
    not_for_training = {str(root / name) for name in (*splits.held_out, *splits.test)}
    training = tuple(path for path in all_for_training.training if path not in not_for_training)
    if not training:
        return all_for_training
    return Splits(training, *(tuple(str(root / name) for name in part) for part in (splits.held_out, splits.test)))
