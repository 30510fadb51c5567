"""Data sets: documents as UTF-8 bytes, in shards."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BOS = 254


class DataError(Exception):
    """A problem with the data that the user can solve, described in one sentence."""


@dataclass(frozen=True)
class Shard:
    """A part of a data set, such as one file: its name, and its stored size in bytes (0 if unknown)."""

    name: str
    size: int


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

    @abstractmethod
    def shards(self) -> Sequence[Shard]:
        """All shards, in a fixed order. Raises `DataError` if they cannot be listed."""

    @abstractmethod
    def documents(self, shard: Shard) -> Iterator[bytes]:
        """The documents of one shard in order, without BOS. Raises `DataError` if it cannot be read."""


def checked_utf8(content: bytes, where: str) -> bytes:
    """Returns `content` if it is valid UTF-8. Bytes 254 (BOS) and 255 (EOS) do not occur in UTF-8.

    Otherwise raises `DataError` with `where` and the offset of the first invalid byte.
    """
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text: byte 0x{content[error.start]:02x} at offset {error.start}; "
            "convert it, or leave it out of the data set"
        ) from None
    return content


def is_held_out(document: bytes, share: float) -> bool:
    """Whether a document is held out, given the held-out fraction `share`. Copies of a document are in the same split, since
    only the content decides."""
    return document_rank(document) < share


def document_rank(document: bytes) -> float:
    """A hash of the document, scaled to a number in [0, 1) that is uniformly distributed over documents."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "big") / 2**64
