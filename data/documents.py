"""Data sets: documents as UTF-8 bytes, in shards."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BOS = 254
"""The byte at the start of a document. It occurs in no valid UTF-8."""

DOCUMENT_BYTES = 32 * 2**20
"""The largest document, and the longest line of a JSON file: 32 MiB. Longer ones are refused, except plain text and nucleotide
sequences, which are split."""

_MESSAGE = 600
"""Maximum number of characters of an error message."""


class DataError(Exception):
    """A problem with the data that the user can solve, described in one sentence.

    File names and contents in the message may be hostile: control characters are escaped, and a long message loses its middle.
    """

    def __init__(self, message: str):
        super().__init__(shown(message, _MESSAGE))


def shown(text: str, limit: int = 200) -> str:
    """`text` on one line of at most `limit` characters, fit for a terminal: line breaks and tabs become spaces, other characters
    that cannot be printed become escapes, and the middle of a longer text becomes an ellipsis."""
    if len(text) > 2 * limit:
        text = text[:limit] + text[-limit:]
    text = "".join(" " if c in "\r\n\t" else c if c.isprintable() else _escaped(c) for c in text)
    if len(text) <= limit:
        return text
    tail = (limit - 3) // 2
    return f"{text[: limit - 3 - tail]} … {text[-tail:]}"


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


@dataclass(frozen=True)
class Shard:
    """A part of a data set, such as one file: its name, and its stored size in bytes (0 if unknown)."""

    name: str
    size: int


@dataclass(frozen=True)
class Extent:
    """What a shard is read from: a file or resource, and the bytes from `start` to `stop` of it (to its end for None)."""

    resource: str
    start: int = 0
    stop: int | None = None

    def overlaps(self, other: Extent) -> bool:
        """Whether both have a byte of the same resource."""
        stop = min(math.inf if one.stop is None else one.stop for one in (self, other))
        return self.resource == other.resource and max(self.start, other.start) < stop


class AbstractSource(ABC):
    """A data set. `shards` and `documents` return the same results in the same order every time."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the data set in messages."""

    @property
    @abstractmethod
    def streamed(self) -> bool:
        """Whether shards are read during training instead of all at once before it."""

    @property
    def held_out_source(self) -> AbstractSource | None:
        """The data set of the held-out documents; None if a fraction of this data set is held out."""
        return None

    @property
    def test_source(self) -> AbstractSource | None:
        """The data set of the test documents, which are read only to evaluate a finished model; None if there are none."""
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes to the user about parts of the data set that are skipped or not used for training."""
        return ()

    def extents(self) -> Sequence[Extent]:
        """What all shards are read from, so that text in two sources is noticed. By default, shards are the same where they
        and their sources have the same names."""
        return [Extent(f"{self.name}: {shard.name}") for shard in self.shards()]

    @abstractmethod
    def shards(self) -> Sequence[Shard]:
        """All shards, in a fixed order. Raises `DataError` if they cannot be listed."""

    @abstractmethod
    def documents(self, shard: Shard) -> Iterator[bytes]:
        """The documents of one shard in order, without BOS. Raises `DataError` if it cannot be read."""


def checked_utf8(content: bytes, where: str, offset: int = 0) -> bytes:
    """Returns `content` if it is valid UTF-8. Bytes 254 (BOS) and 255 (EOS) do not occur in UTF-8.

    Otherwise raises `DataError` with `where` and the position of the first invalid byte: `offset` (of the content) and more.
    """
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text: byte 0x{content[error.start]:02x} at offset {offset + error.start}; "
            "convert it, or leave it out of the data set"
        ) from None
    return content


def checked_size(size: int, where: str) -> None:
    """Raises `DataError` for a document of more than `DOCUMENT_BYTES`, or a line that holds one."""
    if size > DOCUMENT_BYTES:
        raise DataError(
            f"{where} has more than {DOCUMENT_BYTES // 2**20} MiB, the most that a document and its line may have; split it, or "
            "leave it out of the data set"
        )


def is_held_out(document: bytes, share: float) -> bool:
    """Whether a document is held out, given the held-out fraction `share`. Copies of a document are in the same split, since
    only the content decides."""
    return document_rank(document) < share


def document_rank(document: bytes) -> float:
    """A hash of the document, scaled to a number in [0, 1) that is uniformly distributed over documents."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "big") / 2**64
