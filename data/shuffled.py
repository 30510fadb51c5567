"""The shuffle buffers of streams and lanes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import grain
import numpy as np
from grain.experimental import WindowShuffleIterDataset

from data.stream import StreamedRow, StreamRows


def shuffled(rows: StreamRows, state: dict[str, object] | None) -> LaneShuffled | grain.DatasetIterator[StreamedRow]:
    """Rows in windows of a random order each, from `state` on, a result of `get_state`; None for the start."""
    if rows.lane.count > 1:
        return LaneShuffled(rows, state)
    whole = iter(WindowShuffleIterDataset(rows, window_size=rows.lane.window, seed=rows.stream_seed))
    if state is not None:
        whole.set_state(state)
    return whole


@final
class LaneShuffled(Iterator[StreamedRow]):
    """The same of one of several lanes.

    grain's shuffle, which streams have always had, walks through 2^16 places to find those of a window: a row of a window of
    128 takes it 0.4 ms.
    """

    def __init__(self, rows: StreamRows, state: dict[str, object] | None):
        self._data, self._rows = rows, iter(rows)
        self._begin, self._number, self._taken = self._rows.get_state(), 0, 0
        self._window: list[StreamedRow] = []
        if state is None:
            return
        match state:
            case {"window_begin": dict(begin), "window": int(number), "taken": int(taken)}:
                self._begin, self._number, self._taken = begin, number, taken
            case _:
                raise ValueError(f"no state of a lane: {state}")
        self._rows.set_state(self._begin)
        if self._taken:
            self._fill()
            del self._window[-self._taken :]

    def __next__(self) -> StreamedRow:
        if not self._window:
            self._number += self._taken > 0
            self._begin, self._taken = self._rows.get_state(), 0
            self._fill()
        self._taken += 1
        return self._window.pop()

    def _fill(self) -> None:
        lane = self._data.lane
        rows = [next(self._rows) for _ in range(lane.window)]
        # The last number keeps it apart from the orders of shards, which have seeds of two.
        order = np.random.default_rng([self._data.stream_seed, lane.index, self._number, 1]).permutation(lane.window)
        self._window = [rows[place] for place in order]

    def get_state(self) -> dict[str, object]:
        """Where the window begins, its number, and how many of its rows have been taken."""
        return {"window_begin": self._begin.copy(), "window": self._number, "taken": self._taken}
