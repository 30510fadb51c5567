"""What a data set is made of: documents, in shards, as UTF-8 bytes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BOS = 254


class DataError(Exception):
    """Something about the data that the user can put right, said in one sentence."""


@dataclass(frozen=True)
class Shard:
    """A part of a data set that is read in one go: its name, and its size in bytes where it is stored."""

    name: str
    size: int


class AbstractSource(ABC):
    """Where documents come from. `shards` and `documents` give the same answers in the same order every time."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What messages call this data set."""

    @property
    @abstractmethod
    def streamed(self) -> bool:
        """Whether it is too large, or too far away, to be read as a whole before training starts."""

    @property
    def held_out_source(self) -> AbstractSource | None:
        """A data set of its own that holds the held-out documents; None where they are a share of these."""
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user about what of it is not read, or read for another purpose than training."""
        return ()

    @abstractmethod
    def shards(self) -> Sequence[Shard]:
        """All parts, in a fixed order. Raises `DataError` where they cannot be listed."""

    @abstractmethod
    def documents(self, shard: Shard) -> Iterator[bytes]:
        """The documents of one shard in order, without BOS. Raises `DataError` where it cannot be read."""


def checked_utf8(content: bytes, where: str) -> bytes:
    """`content` itself if it is valid UTF-8, so that bytes 254 (BOS) and 255 (EOS) cannot be in it.

    Raises `DataError`, naming `where` and the offset of the first bad byte, if it is not.
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
    """Whether a document belongs to the held-out split: decided by its content alone, so copies of it agree."""
    return document_rank(document) < share


def document_rank(document: bytes) -> float:
    """A number in [0, 1), the same for the same bytes, spread evenly over different ones."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "big") / 2**64
