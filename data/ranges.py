"""Parts of one text file by byte offsets, such as `enwik8.gz[:90e6]`, each of them one document."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.compression import open_bytes, read_errors
from data.documents import AbstractSource, DataError, Extent, Shard, checked_utf8
from data.paths import expanded

_RANGE = re.compile(r"(?P<path>.+)\[(?P<start>[^\[\]:]*):(?P<stop>[^\[\]:]*)\]", re.DOTALL)

_NOT_PLAIN = re.compile(r"\.(jsonl|json|ndjson|parquet|fa|fasta|fna)(\.gz|\.zst|\.zip)?$", re.IGNORECASE)

_BLOCK = 2**20


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `stop` of the uncompressed content of a file; to its end if `stop` is None."""

    path: Path
    start: int = 0
    stop: int | None = None

    def __str__(self) -> str:
        return f"{self.path}[{self.start or ''}:{'' if self.stop is None else self.stop}]"


def named_span(name: str) -> Span | None:
    """The span of a name such as `enwik8[:90e6]` or `text.gz[90_000_000:95e6]`; None for a name without offsets, and for that of
    an existing file.

    Offsets are whole numbers of bytes from the start. Raises `DataError` for other offsets.
    """
    found = _RANGE.fullmatch(name)
    if found is None or expanded(name).exists():
        return None
    start, stop = (_offset(found[end], name) for end in ("start", "stop"))
    if stop is not None and stop <= (start or 0):
        raise DataError(f"{name} is empty: it ends at byte {stop:,}, before it starts")
    return Span(expanded(found["path"]), start or 0, stop)


def _offset(text: str, name: str) -> int | None:
    """A whole number of bytes, such as 90000000, 90_000_000 or 90e6; None for an empty text."""
    text = text.strip()
    if not text:
        return None
    number = re.fullmatch(r"(\d+(?:_\d+)*)(?:[eE](\d{1,2}))?", text[:40], re.ASCII)
    if number is None:
        raise DataError(
            f"{name!r}: {text[:40]!r} is no number of bytes; offsets are whole numbers from the start, as in [90e6:95e6]"
        )
    return int(number[1]) * 10 ** int(number[2] or 0)


class ByteRange(AbstractSource):
    """A span of a plain text file (`.gz`, `.zst` and `.zip` are decompressed) as one document.

    A span may begin or end inside a UTF-8 character: up to three bytes at each end need not be a whole character. Everything
    else must be UTF-8.
    """

    def __init__(self, span: Span):
        """Raises `DataError` if there is no such file, or it is no plain text."""
        if not span.path.is_file():
            raise DataError(f"there is no file {span.path} to take bytes of; name an existing file before the offsets")
        if _NOT_PLAIN.search(span.path.name):
            raise DataError(
                f"{span} takes bytes of plain text, but {span.path.name} holds records; leave the offsets out"
            )
        self.span = span

    @property
    def name(self) -> str:
        return str(self.span)

    @property
    def streamed(self) -> bool:
        return False

    def extents(self) -> Sequence[Extent]:
        return [Extent(str(self.span.path.resolve()), self.span.start, self.span.stop)]

    def shards(self) -> Sequence[Shard]:
        size = 0 if self.span.stop is None else self.span.stop - self.span.start
        return [Shard(str(self.span), size)]

    def documents(self, shard: Shard) -> Iterator[bytes]:
        content = read_span(self.span)
        check_cut_utf8(content, self.name)
        yield content


def read_span(span: Span) -> bytes:
    """The bytes of a span. Raises `DataError` if the file is shorter or cannot be read."""
    size = None if span.stop is None else span.stop - span.start
    before, content = read_bytes(span.path, span.start, size)
    end = before + len(content)
    if before < span.start or not content:
        raise DataError(f"{span} starts behind the end of the file, which has {end:,} bytes")
    if size is not None and len(content) < size:
        raise DataError(f"{span} ends behind the end of the file, which has {end:,} bytes")
    return content


def read_bytes(path: Path, start: int, size: int | None) -> tuple[int, bytes]:
    """At most `size` bytes (all for None) of the uncompressed content of a file from `start` on, and how many bytes are before
    them: fewer than `start` if the content is shorter. Raises `DataError` if it cannot be read."""
    before, parts, missing = 0, [], size
    try:
        with _open(path) as stream:
            while before < start and (block := stream.read(min(_BLOCK, start - before))):
                before += len(block)
            while missing != 0 and (block := stream.read(_BLOCK if missing is None else min(_BLOCK, missing))):
                parts.append(block)
                missing = None if missing is None else missing - len(block)
    # An encrypted archive, or one packed in a way that Python does not know, is a RuntimeError.
    except (*read_errors(), zipfile.BadZipFile, RuntimeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return before, b"".join(parts)


def _open(path: Path) -> io.BufferedReader:
    if path.suffix.lower() == ".zip":
        archive = zipfile.ZipFile(path)
        members = [member for member in archive.infolist() if not member.is_dir()]
        if len(members) != 1:
            raise DataError(f"{path} holds {len(members)} files; an archive to take bytes of must hold one")
        return io.BufferedReader(archive.open(members[0]))  # type: ignore[bad-argument-type]  # which only reads from it
    return open_bytes(path)


def check_cut_utf8(content: bytes, where: str) -> None:
    """Raises `DataError` if `content` is no UTF-8, but for a character at either end that was cut."""
    start, stop = 0, len(content)
    while start < min(3, stop) and content[start] & 0xC0 == 0x80:
        start += 1
    for length in range(1, min(4, stop - start) + 1):
        lead = content[stop - length]
        if lead & 0xC0 == 0x80:
            continue
        needed = 4 if 0xF0 <= lead <= 0xF4 else 3 if lead & 0xF0 == 0xE0 else 2 if lead & 0xE0 == 0xC0 else 1
        stop -= length if needed > length else 0
        break
    checked_utf8(content[start:stop], where)
