"""Nucleotide sequences in FASTA files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from data.documents import DataError

SUFFIXES = (".fa", ".fasta", ".fna")

STRETCH = 1 << 20
"""Bases per document: a longer sequence, such as a chromosome, is split into several documents."""

# The IUPAC letters: bases, and ambiguity codes; and the signs for gaps.
_ALLOWED = re.compile(rb"[ACGTUNRYSWKMBDHVacgtunryswkmbdhv.*-]*")


def read_fasta(
    lines: Iterable[bytes], where: str, leave_out: Callable[[int], None] = lambda bases: None
) -> Iterator[bytes]:
    """The sequences of a FASTA file as documents of upper-case bases, without headers and line breaks.

    Runs of unknown bases (N) and gaps are left out and end a document; `leave_out` is called with their lengths. Raises
    `DataError`, naming `where` and the line, for letters that are not nucleotides and for bases before the first header.
    """
    held: list[bytes] = []
    size, begun = 0, False
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if line.startswith((b">", b";")):
            yield from _cut(b"".join(held), leave_out)
            held, size, begun = [], 0, begun or line.startswith(b">")
            continue
        if line and not begun:
            raise DataError(f"{where}, line {number}: a FASTA file begins with a header, a line that starts with >")
        if not _ALLOWED.fullmatch(line):
            raise DataError(f"{where}, line {number}: {_foreign(line)} is not a nucleotide; proteins are not supported")
        held.append(line.upper())
        size += len(line)
        if size >= 2 * STRETCH:
            content = b"".join(held)
            yield from _cut(content[:STRETCH], leave_out)
            held, size = [content[STRETCH:]], len(content) - STRETCH
    yield from _cut(b"".join(held), leave_out)


def _cut(content: bytes, leave_out: Callable[[int], None]) -> Iterator[bytes]:
    """The documents between runs of unknown bases and gaps."""
    parts = re.split(rb"[N.*-]+", content)
    leave_out(len(content) - sum(map(len, parts)))
    for part in parts:
        for start in range(0, len(part), STRETCH):
            yield part[start : start + STRETCH]


def _foreign(line: bytes) -> str:
    matched = _ALLOWED.match(line)
    assert matched is not None
    return repr(chr(line[matched.end()]))
