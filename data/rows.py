"""Rows, which are training sequences of N bytes, and the three protocols that make them from documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, overload

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from data.documents import BOS
from data.texts import Texts

Protocol = Literal["crop", "cut", "pack"]
"""crop: up to N bytes from a random offset in a document. cut: the first N bytes of each document with at least N. pack: the
concatenation of all documents, split into rows; segment numbers separate the documents in a row. Sizes include BOS."""


class Row(TypedDict):
    """A sequence of N bytes, the segment number of each byte (its document's number within the row), and a mask that is False at
    padding."""

    bytes: UInt8[np.ndarray, " length"]
    segments: Int32[np.ndarray, " length"]
    mask: Bool[np.ndarray, " length"]


class HeldOutRow(Row):
    """A row with the number of each byte's document in the whole held-out text; -1 at padding. Identical documents have the
    same number."""

    documents: Int32[np.ndarray, " length"]


@dataclass(frozen=True)
class Piece:
    """Bytes `start` to `stop` of a document. If `start` is None: `stop` bytes from a random offset."""

    start: int | None
    stop: int


def with_bos(document: bytes) -> UInt8[np.ndarray, " size"]:
    """BOS followed by the document's bytes."""
    return np.frombuffer(bytes([BOS]) + document, np.uint8)


def pieces(size: int, length: int, protocol: Protocol, random: bool) -> list[Piece]:
    """The pieces of at most `length` bytes that a document of `size` bytes, including BOS, is split into.

    There are about `size / length` random crops, which cover each byte once on average. Without `random`, crops are adjacent.
    """
    (count,) = piece_counts(np.array([size]), length, protocol, random)
    return [piece_of(number, size, length, protocol, random) for number in range(count)]


def piece_counts(
    sizes: Int64[np.ndarray, " documents"], length: int, protocol: Protocol, random: bool
) -> Int64[np.ndarray, " documents"]:
    """The number of `pieces` of documents of these sizes."""
    if protocol == "cut":
        return (sizes >= length).astype(np.int64)
    if protocol == "crop" and random:
        return np.maximum(1, np.rint(sizes / length)).astype(np.int64)
    return -(-sizes // length)


def piece_of(number: int, size: int, length: int, protocol: Protocol, random: bool) -> Piece:
    """The piece of this number among the `pieces` of a document."""
    if protocol == "crop" and random:
        return Piece(None, min(size, length))
    start = number * length
    return Piece(start, min(start + length, size))


def cut_piece(
    document: UInt8[np.ndarray, " size"], piece: Piece, rng: np.random.Generator | None
) -> UInt8[np.ndarray, " part"]:
    """The bytes of a piece. `rng` draws its start if that is None; raises `ValueError` if both are None."""
    if piece.start is not None:
        return document[piece.start : piece.stop]
    if rng is None:
        raise ValueError("a piece without a start needs `rng` to draw one")
    start = int(rng.integers(0, len(document) - piece.stop + 1))
    return document[start : start + piece.stop]


def make_row(parts: Sequence[UInt8[np.ndarray, " _"]], length: int) -> Row:
    """A row that concatenates parts of different documents, with zeros as padding at the end. Segment i is part i; padding has
    the number of parts."""
    row = Row(bytes=np.zeros(length, np.uint8), segments=np.zeros(length, np.int32), mask=np.zeros(length, bool))
    fill_row(parts, row["bytes"], row["segments"], row["mask"])
    return row


def fill_row(
    parts: Sequence[UInt8[np.ndarray, " _"]],
    values: UInt8[np.ndarray, " length"],
    segments: Int32[np.ndarray, " length"],
    mask: Bool[np.ndarray, " length"],
) -> None:
    """`make_row` in arrays of zeros."""
    end = 0
    for number, part in enumerate(parts):
        values[end : end + len(part)] = part
        if number:
            segments[end : end + len(part)] = number
        end += len(part)
    segments[end:] = len(parts)
    mask[:end] = True


class MemoryRows:
    """The rows of documents in memory. Indexing returns the index itself: `grain` shuffles indices, and `row` makes the rows."""

    def __init__(
        self, documents: Sequence[bytes], length: int, protocol: Protocol, *, random: bool, order_seed: int = 0
    ):
        """`random`: crops start at random offsets and need an `rng` in `row`. `order_seed`: seed of the order in which documents
        are packed. The attribute `dropped` counts the documents that are too short for the protocol."""
        self.length = length
        self.protocol: Protocol = protocol
        self._random = random
        texts = Texts.of(documents)
        if protocol == "pack":
            texts = texts.take(np.random.default_rng(order_seed).permutation(len(texts)))
            counts, self.dropped = texts.sizes, 0
        else:
            counts = piece_counts(texts.sizes, length, protocol, random)
            self.dropped = int(np.sum(counts == 0))
        self._texts = texts
        # Where the bytes of each document begin among all that are packed; otherwise the same of its pieces.
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])

    def __len__(self) -> int:
        whole = int(self._starts[-1])
        return -(-whole // self.length) if self.protocol == "pack" else whole

    def __getitem__(self, index: int) -> int:
        return index

    def row(self, index: int, rng: np.random.Generator | None) -> Row:
        """The row at `index`. `rng` draws the starts of random crops."""
        if self.protocol == "pack":
            return make_row(list(self._packed(index)), self.length)
        number = self._document_at(index)
        document = self._texts.with_bos(number)
        place = index - int(self._starts[number])
        piece = piece_of(place, len(document), self.length, self.protocol, self._random)
        return make_row([cut_piece(document, piece, rng)], self.length)

    def documents_of(self, index: int) -> range:
        """The numbers of the documents in the row at `index`, in order."""
        if self.protocol == "pack":
            begin, end = index * self.length, min((index + 1) * self.length, int(self._starts[-1]))
            return range(self._document_at(begin), self._document_at(end - 1) + 1)
        number = self._document_at(index)
        return range(number, number + 1)

    def identities(self) -> Int32[np.ndarray, " documents"]:
        """For each document, the number of the first document with the same content."""
        first: dict[bytes, int] = {}
        return np.array([first.setdefault(document, number) for number, document in enumerate(self._texts)], np.int32)

    def _document_at(self, place: int) -> int:
        """The number of the document that has this byte, or this piece."""
        return int(np.searchsorted(self._starts, place, side="right")) - 1

    def _packed(self, index: int) -> Iterator[UInt8[np.ndarray, " _"]]:
        begin, end = index * self.length, min((index + 1) * self.length, int(self._starts[-1]))
        for number in self.documents_of(index):
            stop = min(end, int(self._starts[number + 1]))
            offset = int(self._starts[number])
            yield self._texts.with_bos(number)[begin - offset : stop - offset]
            begin = stop


class HeldOutRows(Sequence[HeldOutRow]):
    """Rows of held-out documents in the given `order`, made lazily."""

    def __init__(self, rows: MemoryRows, order: Int64[np.ndarray, " rows"]):
        self._rows, self._order, self._identities = rows, order, rows.identities()

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> HeldOutRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[HeldOutRow]: ...
    def __getitem__(self, index: int | slice) -> HeldOutRow | Sequence[HeldOutRow]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = int(self._order[index])
        row = self._rows.row(number, None)
        # The segment of padding is the number of documents in the row.
        numbers = np.append(self._identities[list(self._rows.documents_of(number))], np.int32(-1))
        return HeldOutRow(**row, documents=numbers[row["segments"]])
