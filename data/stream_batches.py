"""Batches of the rows of a stream, by one process or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import grain
import numpy as np
from grain.experimental import WindowShuffleIterDataset
from jaxtyping import Bool, Float64, Int32, Int64, UInt8

from data.rows import fill_row
from data.stream import StreamedRow, StreamRows

SHUFFLE_WINDOW = 1024
"""Size of the shuffle buffer for streamed data sets, in rows."""


class StreamedBatch(TypedDict):
    """The rows of a batch, what `StreamedRow` says of each, and the state of the stream after it."""

    bytes: UInt8[np.ndarray, "batch length"]
    segments: Int32[np.ndarray, "batch length"]
    mask: Bool[np.ndarray, "batch length"]
    epochs: Float64[np.ndarray, " batch"]
    earlier_rows: Int64[np.ndarray, " batch"]
    coverage: Int64[np.ndarray, "batch 4"]
    state: dict[str, object]


class StreamBatches(grain.IterDataset):
    """The shuffled rows of a stream in batches, from `state` on (None: from the start).

    Each of several processes reads the whole stream, but makes the rows of its own batches only, which takes most of the time.
    So neither batches nor states depend on the number of processes.
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
        seed = dataset.rows.stream_seed
        self._shuffled = iter(WindowShuffleIterDataset(dataset.rows, window_size=SHUFFLE_WINDOW, seed=seed))
        if dataset.state is not None:
            self._shuffled.set_state(dataset.state)
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
