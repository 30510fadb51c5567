"""Nucleotide sequences in FASTA files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from data.documents import DataError

SUFFIXES = (".fa", ".fasta", ".fna")

DOCUMENT_BASES = 1 << 20
"""Maximum bases per document. A longer sequence, such as a chromosome, is split into several documents."""

# IUPAC letters for bases and ambiguity codes, and the characters for gaps.
_ALLOWED = re.compile(rb"[ACGTUNRYSWKMBDHVacgtunryswkmbdhv.*-]*")


def read_fasta(
    lines: Iterable[bytes], where: str, on_skipped: Callable[[int], None] = lambda bases: None
) -> Iterator[bytes]:
    """The sequences of a FASTA file as documents of upper-case bases, without headers and line breaks.

    Runs of unknown bases (N) and gaps are skipped and end a document. `on_skipped` is called with the number of skipped
    bases. Raises `DataError`, with `where` and the line number, for letters that are not nucleotides and for bases before the
    first header.
    """
    lines_read: list[bytes] = []
    size, header_seen = 0, False
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if line.startswith((b">", b";")):
            yield from _split_at_gaps(b"".join(lines_read), on_skipped)
            lines_read, size, header_seen = [], 0, header_seen or line.startswith(b">")
            continue
        if line and not header_seen:
            raise DataError(f"{where}, line {number}: a FASTA file begins with a header, a line that starts with >")
        if not _ALLOWED.fullmatch(line):
            raise DataError(
                f"{where}, line {number}: {_first_invalid(line)} is not a nucleotide; proteins are not supported"
            )
        lines_read.append(line.upper())
        size += len(line)
        if size >= 2 * DOCUMENT_BASES:
            content = b"".join(lines_read)
            yield from _split_at_gaps(content[:DOCUMENT_BASES], on_skipped)
            lines_read, size = [content[DOCUMENT_BASES:]], len(content) - DOCUMENT_BASES
    yield from _split_at_gaps(b"".join(lines_read), on_skipped)


def _split_at_gaps(content: bytes, on_skipped: Callable[[int], None]) -> Iterator[bytes]:
    """The documents between runs of unknown bases and gaps, each of at most `DOCUMENT_BASES`."""
    parts = re.split(rb"[N.*-]+", content)
    on_skipped(len(content) - sum(map(len, parts)))
    for part in parts:
        for start in range(0, len(part), DOCUMENT_BASES):
            yield part[start : start + DOCUMENT_BASES]


def _first_invalid(line: bytes) -> str:
    matched = _ALLOWED.match(line)
    assert matched is not None
    return repr(chr(line[matched.end()]))
