"""Nucleotide sequences in FASTA files."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

from data.compression import skip_mark
from data.documents import DataError, checked_size
from data.left_out import Count, ignored

SUFFIXES = (".fa", ".fasta", ".fna")

DOCUMENT_BASES = 1 << 20
"""Maximum bases per document. A longer sequence, such as a chromosome, is split into several documents."""

_PART = 1 << 20
"""A longer line, such as a chromosome in one line, is read in parts of about this many bytes."""

# IUPAC letters for bases and ambiguity codes, and the characters for gaps.
_ALLOWED = re.compile(rb"[ACGTUNRYSWKMBDHVacgtunryswkmbdhv.*-]*")


@dataclass(frozen=True)
class _Part:
    """A line, or a part of a long one: its content, the line's number, and whether the line begins here."""

    content: bytes
    number: int
    begins: bool


def read_fasta(stream: io.BufferedReader, where: str, count: Count = ignored) -> Iterator[bytes]:
    """The sequences of a FASTA file as documents of upper-case bases, without headers and line breaks.

    Runs of unknown bases (N) and gaps are skipped and end a document; `count` counts their bases. A file whose last line has no
    line end is counted too, since it may have been cut short. Raises `DataError`, with `where` and the line number, for letters
    that are not nucleotides, for bases before the first header, and for a header that ends the file.
    """
    lines_read: list[bytes] = []
    size, header_seen, last, in_header = 0, False, None, False
    for last in _parts(stream, where):
        line = last.content.lstrip() if last.begins else last.content
        in_header = line.startswith((b">", b";")) if last.begins else in_header
        if in_header:
            yield from _split_at_gaps(b"".join(lines_read), count)
            lines_read, size, header_seen = [], 0, header_seen or line.startswith(b">")
            continue
        line = line.rstrip()
        if line and not header_seen:
            raise DataError(
                f"{where}, line {last.number}: a FASTA file begins with a header, a line that starts with >"
            )
        if not _ALLOWED.fullmatch(line):
            raise DataError(
                f"{where}, line {last.number}: {_first_invalid(line)} is not a nucleotide; proteins are not supported"
            )
        lines_read.append(line.upper())
        size += len(line)
        if size >= 2 * DOCUMENT_BASES:
            content = b"".join(lines_read)
            yield from _split_at_gaps(content[:DOCUMENT_BASES], count)
            lines_read, size = [content[DOCUMENT_BASES:]], len(content) - DOCUMENT_BASES
    yield from _split_at_gaps(b"".join(lines_read), count)
    _check_end(last, in_header, where, count)


def _check_end(last: _Part | None, in_header: bool, where: str, count: Count) -> None:
    if last is None:
        return
    if in_header and not last.content.endswith(b"\n"):
        raise DataError(f"{where} ends within a header (line {last.number}): it is damaged, or was cut short")
    if not last.content.endswith(b"\n"):
        count("open end", 1)


def _parts(stream: io.BufferedReader, where: str) -> Iterator[_Part]:
    """The lines of a stream. A part of a line that is not its end does not end with white space."""
    number, begins = 1, True
    skip_mark(stream)
    while content := stream.readline(_PART):
        while not content.endswith(b"\n") and content[-1:].isspace() and (more := stream.readline(_PART)):
            content += more
            checked_size(len(content), f"{where}, line {number},")
        yield _Part(content, number, begins)
        begins = content.endswith(b"\n")
        number += begins


def _split_at_gaps(content: bytes, count: Count) -> Iterator[bytes]:
    """The documents between runs of unknown bases and gaps, each of at most `DOCUMENT_BASES`."""
    parts = re.split(rb"[N.*-]+", content)
    count("bases", len(content) - sum(map(len, parts)))
    for part in parts:
        for start in range(0, len(part), DOCUMENT_BASES):
            yield part[start : start + DOCUMENT_BASES]


def _first_invalid(line: bytes) -> str:
    matched = _ALLOWED.match(line)
    assert matched is not None
    return repr(chr(line[matched.end()]))
