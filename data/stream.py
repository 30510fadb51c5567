"""Rows of a source that is read shard by shard during training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import grain
import numpy as np
from jaxtyping import Int64, UInt8

from data.coverage import Coverage, shown_bytes
from data.documents import AbstractSource, DataError, is_held_out
from data.lanes import Lane
from data.rows import Piece, Protocol, cut_piece, pieces, with_bos

_COUNTS = tuple(vars(Coverage()))

_Row = tuple[tuple[tuple[UInt8[np.ndarray, " _"], Piece], ...], tuple[int, ...] | None]
"""The `pieces` and the `seed` of a `StreamedRow`."""

StreamState = dict[str, int]
"""The position of a stream, where the next row begins: the `epoch`, the index of the shard in the epoch's order (`shard`), the
`document` of the shard, and the `piece` of the document (for packing: the byte offset). `documents`, `left_out`, `bytes` and
`shown` are the `Coverage` of the documents before it, over all epochs. `rows` counts all rows so far, `earlier_rows` the rows
before the current shard. Of a lane all counts are its own."""


_NOTHING = Coverage()
_WHOLE = Lane()
_NO_COUNTS: StreamState = {"rows": 0, "earlier_rows": 0, **vars(_NOTHING)}


@dataclass(frozen=True, slots=True)
class StreamedRow:
    """A row of a stream, which `parts` makes.

    `pieces`: those of documents that it joins. `seed`: of the random start of its piece; None if it has none. `epochs`: epochs
    completed before its shard, with a fraction by the stored sizes of shards; of a lane, the part of them that its shards are.
    `earlier_rows`: the number of rows before its shard. `coverage`: that of the documents read before it.
    """

    pieces: tuple[tuple[UInt8[np.ndarray, " _"], Piece], ...]
    seed: tuple[int, ...] | None
    epochs: float = 0.0
    earlier_rows: int = 0
    coverage: Coverage = _NOTHING

    @property
    def parts(self) -> list[UInt8[np.ndarray, " _"]]:
        """The bytes of its pieces."""
        rng = None if self.seed is None else np.random.default_rng(self.seed)
        return [cut_piece(document, piece, rng) for document, piece in self.pieces]


class StreamRows(grain.IterDataset):
    """The training rows of a streamed source, or of one lane of it, shard by shard; each epoch has a random order of shards."""

    def __init__(
        self,
        source: AbstractSource,
        length: int,
        protocol: Protocol,
        held_out_share: float,
        seed: int,
        lane: Lane = _WHOLE,
    ):
        super().__init__()
        self.source, self.length, self.held_out_share, self.stream_seed = source, length, held_out_share, seed
        self.lane = lane
        self.protocol: Protocol = protocol

    def __iter__(self) -> _StreamIterator:
        return _StreamIterator(self)

    def order(self, epoch: int, shards: int) -> Int64[np.ndarray, " shards"]:
        """The order of the shards in an epoch."""
        return np.random.default_rng([self.stream_seed, epoch]).permutation(shards)


class _StreamIterator(grain.DatasetIterator):
    def __init__(self, dataset: StreamRows):
        super().__init__()
        self._data = dataset
        self._state: StreamState = dict.fromkeys(("epoch", "shard", "document", "piece"), 0) | _NO_COUNTS
        self._cached_epochs: tuple[int, int, float] = (0, 0, 0.0)
        self._whole_epochs: tuple[int, float] = (0, 0.0)
        self._rows = self._rows_from(self._state)

    def __next__(self) -> StreamedRow:
        before = self._state
        (pieces, seed), after = next(self._rows)
        same_shard = all(before[name] == after[name] for name in ("epoch", "shard"))
        earlier = before["earlier_rows"] if same_shard else before["rows"]
        self._state = {**after, "rows": before["rows"] + 1, "earlier_rows": earlier}
        epochs = self._completed_epochs(after["epoch"], after["shard"])
        return StreamedRow(pieces, seed, epochs, earlier, Coverage(*(after[name] for name in _COUNTS)))

    def get_state(self) -> StreamState:
        return self._state.copy()

    def set_state(self, state: StreamState) -> None:
        # States saved by earlier versions have no counts.
        self._state = _NO_COUNTS | state
        self._rows = self._rows_from(self._state)

    def _completed_epochs(self, epoch: int, index: int) -> float:
        """Epochs completed before the shard at `index` of the order of `epoch`, with a fraction by the stored sizes of shards."""
        if self._cached_epochs[:2] != (epoch, index):
            # One byte is added to each size, since unknown sizes are 0.
            sizes = np.array([shard.size + 1 for shard in self._data.source.shards()])
            counted, completed = self._whole_epochs if self._whole_epochs[0] <= epoch else (0, 0.0)
            for before in range(counted, epoch):
                completed += self._part(sizes, before, len(sizes))
            self._whole_epochs = epoch, completed
            self._cached_epochs = (epoch, index, completed + self._part(sizes, epoch, index))
        return self._cached_epochs[2]

    def _part(self, sizes: Int64[np.ndarray, " shards"], epoch: int, index: int) -> float:
        """The part of an epoch, by `sizes`, that the own shards before `index` of its order are."""
        own = self._data.lane.places(epoch, len(sizes))
        before = sizes[self._data.order(epoch, len(sizes))[own.start : index : own.step]]
        return float(before.sum() / sizes.sum())

    def _rows_from(self, state: StreamState) -> Iterator[tuple[_Row, StreamState]]:
        """The rows that follow `state`, each with the state after it."""
        if self._data.protocol == "pack":
            return self._packed_from(state)
        return self._pieces_from(state)

    def _pieces_from(self, state: StreamState) -> Iterator[tuple[_Row, StreamState]]:
        data = self._data
        for document, position in self._documents_from(state):
            document_pieces = pieces(len(document), data.length, data.protocol, random=True)
            first = state["piece"] if _same_document(position, state) else 0
            for number in range(first, len(document_pieces)):
                piece = document_pieces[number]
                seed = None
                if piece.start is None:
                    seed = data.stream_seed, position["epoch"], position["shard"], position["document"], number
                yield (((document, piece),), seed), {**position, "piece": number + 1}

    def _packed_from(self, state: StreamState) -> Iterator[tuple[_Row, StreamState]]:
        length, joined, filled = self._data.length, [], 0
        for document, position in self._documents_from(state):
            begin = state["piece"] if _same_document(position, state) else 0
            while begin < len(document):
                piece = Piece(begin, min(begin + length - filled, len(document)))
                joined.append((document, piece))
                begin, filled = piece.stop, filled + piece.stop - begin
                if filled == length:
                    yield (tuple(joined), None), {**position, "piece": begin}
                    joined, filled = [], 0

    def _documents_from(self, state: StreamState) -> Iterator[tuple[UInt8[np.ndarray, " size"], StreamState]]:
        data = self._data
        shards = data.source.shards()
        epoch, first_shard, first_document = state["epoch"], state["shard"], state["document"]
        any_usable, barren = first_shard > 0 or first_document > 0, 0
        coverage = Coverage(*(state[name] for name in vars(Coverage())))
        while True:
            order = data.order(epoch, len(shards))
            for index in data.lane.places(epoch, len(shards)):
                if index < first_shard:
                    continue
                for number, document in enumerate(data.source.documents(shards[order[index]])):
                    if number < first_document or is_held_out(document, data.held_out_share):
                        continue
                    if shown_bytes(len(document), data.length, data.protocol):
                        any_usable = True
                        position = {"epoch": epoch, "shard": index, "document": number, "piece": 0}
                        # Of a long document that is cut, no row that waits to be shuffled keeps the rest.
                        used = document[: data.length] if data.protocol == "cut" else document
                        yield with_bos(used), {**position, **vars(coverage)}
                    coverage = coverage.plus(len(document), data.length, data.protocol)
                first_document = 0
            barren = 0 if any_usable else barren + 1
            if barren == data.lane.patience:
                raise DataError(
                    f"no document of {data.source.name} can be used for training: after a whole epoch, all were held out or too "
                    "short for a row; use a smaller --length or --data.protocol crop"
                )
            epoch, first_shard, any_usable = epoch + 1, 0, False


def _same_document(position: StreamState, state: StreamState) -> bool:
    return all(position[key] == state[key] for key in ("epoch", "shard", "document"))


def stream_held_out(
    source: AbstractSource, share: float, max_bytes: int, length: int, protocol: Protocol
) -> list[bytes]:
    """Held-out documents from the start of a stream: as many as rows of `max_bytes` together need, or all if there are fewer.

    `share`: the held-out fraction. Raises `DataError` if no document is held out.
    """
    held_out: list[bytes] = []
    size = 0
    for shard in source.shards():
        for document in source.documents(shard):
            if is_held_out(document, share):
                held_out.append(document)
                size += sum(
                    piece.stop - (piece.start or 0) for piece in pieces(len(document) + 1, length, protocol, False)
                )
                if size >= max_bytes:
                    return held_out
    if not held_out:
        raise DataError(f"{source.name} has no held-out document at a fraction of {share}; raise --data.held-out")
    return held_out
