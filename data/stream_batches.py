"""Batches of the rows of a stream, by one process or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import grain
import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64, UInt8

from data.rows import fill_row
from data.shuffled import shuffled
from data.stream import StreamedRow, StreamRows


class Batch(TypedDict):
    """A batch of rows (training sequences): bytes, segment numbers of the documents in each row, and a mask that is False at
    padding."""

    bytes: UInt8[np.ndarray, "batch length"]
    segments: Int32[np.ndarray, "batch length"]
    mask: Bool[np.ndarray, "batch length"]


class ReadLane(TypedDict):
    """What `StreamedRow` says of each row of a batch, and the state of their stream or lane after it."""

    epochs: Float64[np.ndarray, " batch"]
    earlier_rows: Int64[np.ndarray, " batch"]
    coverage: Int64[np.ndarray, "batch 4"]
    state: dict[str, object]


class StreamedBatch(Batch, ReadLane):
    """The rows of a batch that come from one stream or lane."""


class LanesBatch(Batch):
    """The rows of a batch that come from some lanes, and what is said of each."""

    lanes: list[ReadLane]


class StreamBatches(grain.IterDataset):
    """The shuffled rows of a stream in batches, from `state` on (None: from the start).

    `batch`: the rows of a batch that come from this stream, all of them or those of a lane. Each worker process reads the whole
    stream, but makes the rows of its own batches only, which takes most of the time. So neither batches nor states depend on
    their number.
    """

    def __init__(self, rows: StreamRows, batch: int, state: dict[str, object] | None):
        super().__init__()
        self.rows, self.rows_of_batch, self.state = rows, batch, state
        self.first, self.every = 0, 1

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Called by grain in each worker process: its batches are those of the slice."""
        self.first, self.every = sl.start or 0, sl.step or 1

    def __iter__(self) -> _BatchIterator:
        return _BatchIterator(self)


class _BatchIterator(grain.DatasetIterator):
    def __init__(self, dataset: StreamBatches):
        super().__init__()
        self._data = dataset
        self._shuffled = shuffled(dataset.rows, dataset.state)
        self._others = dataset.first

    def __next__(self) -> StreamedBatch:
        for _ in range(self._others * self._data.rows_of_batch):
            next(self._shuffled)
        self._others = self._data.every - 1
        rows = [next(self._shuffled) for _ in range(self._data.rows_of_batch)]
        return make_batch(rows, self._data.rows.length, self._shuffled.get_state())

    def get_state(self) -> dict[str, object]:
        return self._shuffled.get_state()

    def set_state(self, state: dict[str, object]) -> None:
        raise NotImplementedError("a stream goes on from the state that `StreamBatches` is given")


class LaneBatches(grain.IterDataset):
    """Batches whose rows come from some lanes, in equal blocks."""

    def __init__(self, lanes: Sequence[StreamBatches]):
        super().__init__()
        self.lanes = lanes

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """As in `StreamBatches`."""
        for lane in self.lanes:
            lane.set_slice(sl, sequential_slice)

    def __iter__(self) -> _LanesIterator:
        return _LanesIterator(self.lanes)


class _LanesIterator(grain.DatasetIterator):
    def __init__(self, lanes: Sequence[StreamBatches]):
        super().__init__()
        self._lanes = [iter(lane) for lane in lanes]

    def __next__(self) -> LanesBatch:
        read = [next(lane) for lane in self._lanes]
        return LanesBatch(
            bytes=np.concatenate([one["bytes"] for one in read]),
            segments=np.concatenate([one["segments"] for one in read]),
            mask=np.concatenate([one["mask"] for one in read]),
            lanes=[_said(one) for one in read],
        )

    def get_state(self) -> dict[str, object]:
        return {"lanes": [lane.get_state() for lane in self._lanes]}

    def set_state(self, state: dict[str, object]) -> None:
        raise NotImplementedError("lanes go on from the states that their `StreamBatches` are given")


def _said(read: StreamedBatch) -> ReadLane:
    """A batch of one lane without its rows."""
    return ReadLane(
        epochs=read["epochs"], earlier_rows=read["earlier_rows"], coverage=read["coverage"], state=read["state"]
    )


def make_batch(rows: Sequence[StreamedRow], length: int, state: dict[str, object]) -> StreamedBatch:
    """The batch of these rows; `state`: that after it."""
    shape = len(rows), length
    found = StreamedBatch(
        bytes=np.zeros(shape, np.uint8),
        segments=np.zeros(shape, np.int32),
        mask=np.zeros(shape, bool),
        epochs=np.array([row.epochs for row in rows]),
        earlier_rows=np.array([row.earlier_rows for row in rows]),
        coverage=np.array([tuple(vars(row.coverage).values()) for row in rows]),
        state=state,
    )
    for number, row in enumerate(rows):
        fill_row(row.parts, found["bytes"][number], found["segments"][number], found["mask"][number])
    return found
