"""Plain text as documents."""

from __future__ import annotations

import io
from collections.abc import Iterator

from data.compression import skip_mark
from data.documents import DataError, checked_utf8

PLAIN_DOCUMENT = 64 * 1024
"""A longer plain text file is split at line ends into documents of about this many bytes."""


def plain_documents(stream: io.BufferedReader, where: str, size: int = PLAIN_DOCUMENT) -> Iterator[bytes]:
    """The documents of a plain text: each ends at the first line end after `size` bytes.

    A line of more than 2 `size` bytes is split too, after a space, or between two characters where there is none. No byte is
    lost but a byte-order mark. Raises `DataError`, with `where` and the offset, for text that is not UTF-8.
    """
    parts: list[bytes] = []
    collected, offset = 0, skip_mark(stream)
    for part in _parts(stream, 2 * size):
        parts.append(part)
        collected += len(part)
        if collected >= size:
            yield _checked(b"".join(parts), where, offset, stream)
            offset += collected
            parts, collected = [], 0
    if parts:
        yield _checked(b"".join(parts), where, offset, stream)


def _parts(stream: io.BufferedReader, longest: int) -> Iterator[bytes]:
    """The lines of a stream, with their line ends; longer ones than `longest` in parts."""
    rest = b""
    while part := rest + stream.readline(longest - len(rest)):
        rest = b""
        if len(part) == longest and not part.endswith(b"\n"):
            end = _boundary(part)
            part, rest = part[:end], part[end:]
        yield part


def _boundary(part: bytes) -> int:
    """Where to cut the beginning of a long line: after the last space of its second half, or between two characters."""
    space = part.rfind(b" ", len(part) // 2)
    if space >= 0:
        return space + 1
    for back in range(1, 5):
        if part[-back] < 0x80:
            return len(part) - back + 1
        if part[-back] >= 0xC0:  # the first byte of a character
            return len(part) - back
    return len(part)


def _checked(document: bytes, where: str, offset: int, stream: io.BufferedReader) -> bytes:
    try:
        return checked_utf8(document, where, offset)
    except DataError:
        if _ends_within_a_character(document) and not stream.peek(1):
            raise DataError(
                f"{where} ends within a character (at offset {offset + len(document)}): it is damaged, or was cut short"
            ) from None
        raise


def _ends_within_a_character(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False
