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
    """A part of a data set that is read as a whole: its name, and its stored size in bytes (0 if unknown)."""

    name: str
    size: int


class AbstractSource(ABC):
    """A source of documents. `shards` and `documents` return the same results in the same order every time."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the data set in messages."""

    @property
    @abstractmethod
    def streamed(self) -> bool:
        """Whether it is read during training, since it is too large or too remote to be read before."""

    @property
    def held_out_source(self) -> AbstractSource | None:
        """The data set of the held-out documents; None if they are a fraction of this one's."""
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes to the user about parts that are not read, or not used for training."""
        return ()

    @abstractmethod
    def shards(self) -> Sequence[Shard]:
        """All shards, in a fixed order. Raises `DataError` if they cannot be listed."""

    @abstractmethod
    def documents(self, shard: Shard) -> Iterator[bytes]:
        """The documents of one shard in order, without BOS. Raises `DataError` if it cannot be read."""


def checked_utf8(content: bytes, where: str) -> bytes:
    """`content`, if it is valid UTF-8, in which bytes 254 (BOS) and 255 (EOS) cannot occur.

    Otherwise raises `DataError`, naming `where` and the offset of the first invalid byte.
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
    """Whether a document is held out. Its content alone decides, so that copies are in the same split."""
    return document_rank(document) < share


def document_rank(document: bytes) -> float:
    """A hash of the document as a number in [0, 1), uniformly distributed over documents."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "big") / 2**64
