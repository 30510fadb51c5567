"""Rows, which are training sequences of N bytes, and the three protocols that make them from documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, overload

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from data.documents import BOS

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
    if protocol == "cut":
        return [Piece(0, length)] if size >= length else []
    if protocol == "crop" and random:
        return [Piece(None, min(size, length))] * max(1, round(size / length))
    return [Piece(start, min(start + length, size)) for start in range(0, size, length)]


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
    values = np.zeros(length, np.uint8)
    segments = np.full(length, len(parts), np.int32)
    end = 0
    for number, part in enumerate(parts):
        values[end : end + len(part)] = part
        segments[end : end + len(part)] = number
        end += len(part)
    return Row(bytes=values, segments=segments, mask=np.arange(length) < end)


class MemoryRows:
    """The rows of documents in memory. Indexing returns the index itself: `grain` shuffles indices, and `row` makes the rows."""

    def __init__(
        self, documents: Sequence[bytes], length: int, protocol: Protocol, *, random: bool, order_seed: int = 0
    ):
        """`random`: crops start at random offsets and need an `rng` in `row`. `order_seed`: seed of the order in which documents
        are packed. The attribute `dropped` counts the documents that are too short for the protocol."""
        self.length = length
        self.protocol: Protocol = protocol
        self.dropped = 0
        if protocol == "pack":
            order = np.random.default_rng(order_seed).permutation(len(documents))
            documents = [documents[number] for number in order]
        self._documents = [with_bos(document) for document in documents]
        self._starts = np.cumsum([0] + [len(document) for document in self._documents])
        self._rows: list[tuple[int, Piece]] = []
        if protocol != "pack":
            for number, document in enumerate(self._documents):
                document_pieces = pieces(len(document), length, protocol, random)
                self.dropped += not document_pieces
                self._rows += [(number, piece) for piece in document_pieces]

    def __len__(self) -> int:
        return -(-int(self._starts[-1]) // self.length) if self.protocol == "pack" else len(self._rows)

    def __getitem__(self, index: int) -> int:
        return index

    def row(self, index: int, rng: np.random.Generator | None) -> Row:
        """The row at `index`. `rng` draws the starts of random crops."""
        if self.protocol == "pack":
            return make_row(list(self._packed(index)), self.length)
        number, piece = self._rows[index]
        return make_row([cut_piece(self._documents[number], piece, rng)], self.length)

    def documents_of(self, index: int) -> range:
        """The numbers of the documents in the row at `index`, in order."""
        if self.protocol == "pack":
            begin, end = index * self.length, min((index + 1) * self.length, int(self._starts[-1]))
            first, last = np.searchsorted(self._starts, [begin, end - 1], side="right") - 1
            return range(int(first), int(last) + 1)
        number, _ = self._rows[index]
        return range(number, number + 1)

    def identities(self) -> Int32[np.ndarray, " documents"]:
        """For each document, the number of the first document with the same content."""
        first: dict[bytes, int] = {}
        return np.array(
            [first.setdefault(document.tobytes(), number) for number, document in enumerate(self._documents)], np.int32
        )

    def _packed(self, index: int) -> Iterator[UInt8[np.ndarray, " _"]]:
        begin, end = index * self.length, min((index + 1) * self.length, int(self._starts[-1]))
        for number in self.documents_of(index):
            stop = min(end, int(self._starts[number + 1]))
            offset = int(self._starts[number])
            yield self._documents[number][begin - offset : stop - offset]
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
