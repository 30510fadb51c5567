"""How far the lanes of a stream have been read, for reports and to go on from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from data.coverage import Coverage
from data.documents import DataError
from data.stream_batches import ReadLane


@dataclass(frozen=True)
class Reading:
    """How much of a data set has been read.

    `epochs`: how often. `coverage`: that of the training documents; for a stream, of those read so far (None before the first).
    """

    epochs: float
    coverage: Coverage | None


@dataclass
class LanePlace:
    """How far one lane has been read.

    `epochs`: its part of the epochs of the stream, which those of all lanes add up to. `coverage`: of the documents read so far;
    None before the first. `stream`: its state; None before the first batch.
    """

    epochs: float = 0.0
    coverage: Coverage | None = None
    stream: dict[str, object] | None = None

    def advance(self, read: ReadLane, returned: int) -> None:
        """A batch was `read`, with which `returned` rows of the lane have been returned so far."""
        self.stream = read["state"]
        # The shuffle buffer reads ahead: more rows may precede the latest shard than have been returned.
        earlier = int(read["earlier_rows"].max())
        self.epochs = max(self.epochs, float(read["epochs"].max()) * min(1.0, returned / max(1, earlier)))
        counts = Coverage(*(int(count) for count in read["coverage"].max(axis=0)))
        # There is no coverage before the first document has been counted.
        if counts.bytes and (self.coverage is None or counts.bytes > self.coverage.bytes):
            self.coverage = counts

    def state(self) -> dict[str, object]:
        """What `_place_of` reads."""
        coverage = None if self.coverage is None else [*vars(self.coverage).values()]
        return {"epochs": self.epochs, "coverage": coverage, "stream": self.stream}


@dataclass
class Places:
    """How far some of `count` lanes have been read: `lanes`, by their index."""

    count: int
    lanes: dict[int, LanePlace] = field(default_factory=dict)

    @classmethod
    def of(cls, count: int, lanes: Sequence[int], state: dict[str, object] | None) -> Places:
        """Those of `lanes` in a result of `Batches.state`, or in what `merged` made of several; None for the start.

        Raises `DataError` where the state is that of another number of lanes, or has not all of them.
        """
        if state is None:
            return cls(count, {lane: LanePlace() for lane in lanes})
        saved = _saved(state)
        if state.get("lane_count", 1) != count or not saved.keys() >= set(lanes):
            raise DataError(
                f"the saved state of the data is that of other lanes: go on with --data.lanes {state.get('lane_count', 1)}"
            )
        return cls(count, {lane: saved[lane] for lane in lanes})

    def advance(self, read: Iterable[ReadLane], returned: int) -> None:
        """A batch was `read`, with which `returned` rows of each lane have been returned so far."""
        for place, one in zip(self.lanes.values(), read, strict=True):
            place.advance(one, returned)

    @property
    def reading(self) -> Reading:
        """What was read: of all lanes where these are all, else epochs as these let expect them, and what these cover."""
        coverages = [place.coverage for place in self.lanes.values() if place.coverage is not None]
        epochs = sum(place.epochs for place in self.lanes.values()) * self.count / len(self.lanes)
        return Reading(epochs, Coverage.total(coverages) if coverages else None)

    def state(self) -> dict[str, object]:
        """The part of `Batches.state` that says where the lanes are."""
        if self.count == 1:
            return {"stream": self.lanes[0].stream}
        return {"lane_count": self.count, "lanes": {str(lane): place.state() for lane, place in self.lanes.items()}}


def merged(states: Sequence[dict[str, object]]) -> dict[str, object]:
    """The state of a whole stream, from the `Batches.state` of processes that read some of its lanes each, after one batch."""
    count = states[0].get("lane_count", 1)
    if not isinstance(count, int) or count == 1:
        return states[0]
    lanes = {lane: place for state in states for lane, place in _saved(state).items()}
    places = Places(count, dict(sorted(lanes.items())))
    return {"step": states[0]["step"], "epochs": places.reading.epochs, **places.state()}


def reading_of(state: dict[str, object]) -> Reading:
    """What was read of a stream whose lanes are all in a state."""
    lanes = _saved(state)
    return Places(len(lanes), lanes).reading


def _saved(state: dict[str, object]) -> dict[int, LanePlace]:
    """The places in a state, by lane."""
    lanes = state.get("lanes")
    if not isinstance(lanes, dict):
        return {0: _place_of(state)}
    return {int(lane): _place_of(place) for lane, place in lanes.items()}


def _place_of(state: dict[str, object]) -> LanePlace:
    """The place of a lane, or of a stream that is not divided, whose state has no coverage."""
    # States saved by earlier versions have no epochs.
    epochs, counts, stream = state.get("epochs"), state.get("coverage"), state.get("stream")
    return LanePlace(
        epochs if isinstance(epochs, float) else 0.0,
        Coverage(*counts) if isinstance(counts, list) else None,
        _of_all_workers(stream) if isinstance(stream, dict) else None,
    )


def _of_all_workers(state: dict[str, object]) -> dict[str, object]:
    """The state of a stream, which earlier versions saved as that of their only worker process."""
    workers = state.get("iterators_in_use_states")
    return workers[0] if isinstance(workers, list) else state
