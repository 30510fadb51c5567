"""Lanes of a stream: whoever reads them, the batches are the same, and nobody reads the shards of another."""

import dataclasses
import itertools
import json
from collections import Counter

import numpy as np
import pytest

from data import DataError, Protocol, load, open_batches
from data.lanes import SHUFFLE_WINDOW, Lane, lanes_of
from data.places import merged, reading_of
from data.shuffled import shuffled
from data.stream import StreamRows
from data.stream_batches import LaneBatches, StreamBatches
from experiments.config.errors import ConfigError
from experiments.config.presets import PRESETS
from experiments.processes.processes import ALONE, Alone
from experiments.reporting.display import Display
from experiments.run import parse
from experiments.training.data import lanes_of_run, reading_of_all, state_of_all, with_lanes
from experiments.training.run_dir import differing, prepare_new, with_any_lanes
from experiments.training.session import Session
from experiments.training.setup import set_up
from tests.hostile.forked import SMALL
from tests.recorded import Recorded

LENGTH, BATCH = 16, 8


def split_of(source, protocol: Protocol = "crop"):
    found = load(source, length=LENGTH, protocol=protocol, held_out_share=0.2, held_out_bytes=64)
    source.opened.clear()
    return found


def read(split, count, rows=None, state=None, lanes=4, batch=BATCH):
    """So many batches, and the state after them as it comes out of a file."""
    batches = open_batches(split, batch=batch, seed=3, state=state, rows=rows, lanes=lanes)
    found = [next(batches) for _ in range(count)]
    after = json.loads(json.dumps(batches.state()))
    batches.close()
    return found, after


def read_by(processes, split, count, state=None, lanes=4):
    """What so many processes read together, whose rows are equal parts of each batch, and the state that a checkpoint has."""
    bounds = np.linspace(0, BATCH, processes + 1).astype(int)
    parts, states = zip(
        *(read(split, count, slice(*pair), state, lanes) for pair in itertools.pairwise(bounds)), strict=True
    )
    whole = [
        {name: np.concatenate([part[name] for part in rows]) for name in ("bytes", "segments", "mask")}
        for rows in zip(*parts, strict=True)
    ]
    return whole, merged(states)


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        for name in ("bytes", "segments", "mask"):
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("protocol", ["crop", "cut", "pack"])
def test_any_number_of_processes_reads_and_goes_on_with_the_same_batches(protocol, monkeypatch):
    """Across the ends of epochs and buffers, and where the edges of lanes and of processes are not the same."""
    monkeypatch.setattr("data.lanes.SHUFFLE_WINDOW", 4 * 16)
    split = split_of(Recorded(documents=3), protocol)
    whole, state = read(split, 24)
    assert reading_of(state).epochs > 1
    one, after_one = read(split, 9)
    two, after_two = read_by(2, split, 6, after_one)
    three, after_three = read_by(3, split, 3, after_two)
    four, after_four = read_by(4, split, 6, after_three)
    assert_equal(whole, [*one, *two, *three, *four])
    assert after_four == state


def test_processes_open_no_shards_of_others():
    source = Recorded(shards=40, documents=40)
    split, opened = split_of(source), []
    for rows in (slice(0, 4), slice(4, 8)):
        read(split, 20, rows, lanes=2)
        opened.append(set(source.opened))
        source.opened.clear()
    # The buffer of each lane has 512 rows, and a shard some 200 of them: the first four of its shards.
    assert [len(names) for names in opened] == [4, 4]
    assert not opened[0] & opened[1]
    order = StreamRows(source, LENGTH, "crop", 0.2, seed=3).order(0, 40)
    assert opened[0] <= {str(shard) for shard in order[0::2]}
    assert opened[1] <= {str(shard) for shard in order[1::2]}


@pytest.mark.parametrize(("count", "shards"), [(1, 5), (2, 5), (3, 5), (4, 4), (5, 7)])
def test_every_training_document_comes_once_an_epoch(count, shards):
    source = Recorded(shards, documents=5)
    seen = {epoch: Counter() for epoch in range(4)}
    for index in range(count):
        lane = StreamRows(source, LENGTH, "cut", 0.2, seed=1, lane=Lane(index, count))
        for row, state in zip(iter(lane), _states(lane), strict=False):
            if state["epoch"] == len(seen):
                break
            seen[state["epoch"]][row.parts[0].tobytes()] += 1
    assert {*seen[0].values()} == {1}
    assert len(seen[0]) > 2 * shards
    assert all(documents == seen[0] for documents in seen.values())


def _states(rows):
    """The state after each row."""
    iterator = iter(rows)
    while True:
        next(iterator)
        yield iterator.get_state()


def test_lanes_get_the_same_number_of_shards_in_the_long_run_and_share_one_buffer():
    given = [sum(len(Lane(index, 4).places(epoch, 7)) for epoch in range(4)) for index in range(4)]
    assert given == [7, 7, 7, 7]
    for count in (1, 3, 8, SHUFFLE_WINDOW):
        windows = [Lane(index, count).window for index in range(count)]
        assert sum(windows) == SHUFFLE_WINDOW
        assert min(windows) >= SHUFFLE_WINDOW // count
    assert [*lanes_of(4, 8, slice(3, 6))] == [1, 2]
    assert [*lanes_of(4, 8, slice(2, 4))] == [1]


def test_a_shuffle_buffer_gives_each_row_once_and_goes_on_from_any_row(monkeypatch):
    monkeypatch.setattr("data.lanes.SHUFFLE_WINDOW", 24)
    rows = StreamRows(Recorded(documents=3), LENGTH, "crop", 0.2, seed=3, lane=Lane(1, 4))
    in_order = [row.seed for row, _ in zip(rows, range(18), strict=False)]
    buffer = shuffled(rows, None)
    states, found = [buffer.get_state()], []
    for row, _ in zip(buffer, range(18), strict=False):
        found.append(row.seed)
        states.append(buffer.get_state())
    windows = [(found[i : i + 6], in_order[i : i + 6]) for i in (0, 6, 12)]
    for mixed, plain in windows:
        assert mixed != plain
        assert sorted(mixed) == sorted(plain)
    # Each window has an order of its own.
    assert len({tuple(plain.index(seed) for seed in mixed) for mixed, plain in windows}) == 3
    for number in range(18):
        again = shuffled(rows, json.loads(json.dumps(states[number])))
        assert again.get_state() == states[number]
        assert [next(again).seed for _ in range(18 - number)] == found[number:]


def test_the_counts_of_all_lanes_are_those_of_the_run():
    """After a whole epoch; a process that reads a part of the lanes expects the same of the others."""
    source = Recorded(shards=8, documents=40)
    split = split_of(source, "cut")
    batches = open_batches(split, batch=BATCH, seed=3, lanes=4)
    rows = sum(len(documents) for documents in source.texts.values()) * 0.8
    for _ in range(25):
        next(batches)
    state = batches.state()
    assert reading_of(state) == batches.reading
    batches.close()
    assert batches.epochs == pytest.approx(25 * BATCH / rows, rel=0.15)
    part = open_batches(split, batch=BATCH, seed=3, lanes=4, rows=slice(0, 2))
    for _ in range(25):
        next(part)
    part.close()
    assert part.epochs == pytest.approx(batches.epochs, rel=0.15)
    assert part.coverage is not None
    assert batches.coverage is not None
    assert part.coverage.documents < batches.coverage.documents
    assert part.coverage.share == pytest.approx(batches.coverage.share, abs=0.02)
    one_lane = open_batches(split, batch=BATCH, seed=3)
    for _ in range(25):
        next(one_lane)
    assert one_lane.state().keys() == {"step", "epochs", "stream"}
    assert merged([one_lane.state(), {}]) == one_lane.state()
    one_lane.close()


def test_worker_processes_of_lanes_make_every_batch_once():
    def batches(first, every, count):
        opened = [
            StreamBatches(StreamRows(Recorded(), LENGTH, "crop", 0.2, seed=3, lane=Lane(index, 2)), 4, None)
            for index in range(2)
        ]
        found = LaneBatches(opened)
        found.set_slice(slice(first, None, every))
        return [batch for batch, _ in zip(found, range(count), strict=False)]

    whole = batches(0, 1, 4)
    assert_equal(whole[1:4:2], batches(1, 2, 2))
    assert [one["state"] for one in whole[2]["lanes"]] == [one["state"] for one in batches(2, 3, 1)[0]["lanes"]]


@pytest.mark.parametrize(
    ("lanes", "batch", "sentence"),
    [
        (3, 8, "--data.lanes 3 must divide --batch 8, .* use one of 1, 2, 4$"),
        (16, 8, "--data.lanes 16 must divide --batch 8, .* use one of 1, 2, 4$"),
        (8, 8, r"--data.lanes 8 are more than the 7 shard\(s\) of recorded, .* use --data.lanes 4$"),
    ],
)
def test_streams_that_cannot_be_divided_are_refused(lanes, batch, sentence):
    with pytest.raises(DataError, match=sentence):
        read(split_of(Recorded()), 1, lanes=lanes, batch=batch)


@pytest.mark.parametrize(("saved", "lanes"), [(1, 4), (4, 2), (4, 1)])
def test_a_state_of_other_lanes_is_refused(saved, lanes):
    split = split_of(Recorded())
    _, state = read(split, 1, lanes=saved)
    with pytest.raises(DataError, match=f"is that of other lanes: go on with --data.lanes {saved}$"):
        read(split, 1, state=state, lanes=lanes)


def test_a_lane_that_meets_no_usable_document_for_long_says_so():
    source = Recorded(shards=4)
    rows = StreamRows(source, 1000, "cut", 0.2, seed=0, lane=Lane(1, 4))
    with pytest.raises(DataError, match="no document of recorded can be used"):
        next(iter(rows))
    # One in four shards has such documents: a lane may meet others for a while.
    source.texts["2"] = [b"x" * 2000 + b"%d" % number for number in range(20)]
    for seed in range(5):
        rows = StreamRows(source, 1000, "cut", 0.2, seed=seed, lane=Lane(1, 4))
        assert len(next(iter(rows)).parts[0]) == 1000


def one_of_two(monkeypatch, other):
    """A process that hears what another one said."""
    processes = Alone()
    monkeypatch.setattr(processes, "count", 2)
    monkeypatch.setattr(processes, "said", lambda own: [own, other])
    return processes


def test_a_checkpoint_has_the_lanes_of_all_processes(monkeypatch):
    split, count = split_of(Recorded()), 3
    _, whole = read(split, count)
    (_, first), (_, second) = (read(split, count, rows) for rows in (slice(0, 4), slice(4, 8)))
    assert [*first["lanes"], *second["lanes"]] == ["0", "1", "2", "3"]
    assert state_of_all(first, one_of_two(monkeypatch, json.dumps(second))) == whole
    assert state_of_all(whole, ALONE) == whole
    batches = open_batches(split, batch=BATCH, seed=3, state=first, rows=slice(0, 4), lanes=4)
    assert reading_of_all(batches, one_of_two(monkeypatch, json.dumps(second))) == reading_of(whole)
    batches.close()
    # Of one lane all know all: nobody is asked.
    _, one = read(split, count, slice(0, 4), lanes=1)
    assert state_of_all(one, one_of_two(monkeypatch, "?")) == one


def run_of(batch=8, resume=False, **data):
    tiny = PRESETS["tiny"]
    return dataclasses.replace(tiny, batch=batch, resume=resume, data=dataclasses.replace(tiny.data, **data))


@pytest.mark.parametrize(
    ("run", "processes", "lanes"),
    [
        (run_of(), 1, 1),
        (run_of(), 4, 4),
        (run_of(), 3, 2),
        # There are seven shards.
        (run_of(batch=16), 16, 4),
        (run_of(batch=7), 16, 7),
        (run_of(lanes=2), 4, 2),
        (run_of(lanes=1), 4, 1),
        # A run from before there were lanes, or that one process began.
        (run_of(resume=True), 4, 1),
        (run_of(resume=True, lanes=4), 2, 4),
    ],
)
def test_the_number_of_lanes_is_decided_when_a_run_begins_and_kept(run, processes, lanes):
    split = split_of(Recorded())
    assert lanes_of_run(run, split, processes) == lanes
    written = with_lanes(run, lanes)
    assert written.data.lanes == (run.data.lanes if lanes == 1 else lanes)
    assert lanes_of_run(dataclasses.replace(written, resume=True), split, 1) == lanes
    # Reports compare runs whatever the number of processes.
    assert not differing(with_any_lanes(written), with_any_lanes(run))


def test_a_number_of_lanes_that_cannot_be_is_refused_before_a_run_begins():
    source = Recorded()
    with pytest.raises(DataError, match=r"--data\.lanes 3 must divide --batch 8"):
        lanes_of_run(run_of(lanes=3), split_of(source), 1)
    with pytest.raises(ConfigError, match=r"--data\.lanes must be a whole number from 1 to 1024; got 0"):
        run_of(lanes=0)
    source.streamed = False
    split = split_of(source)
    assert [lanes_of_run(run_of(), split, 4), lanes_of_run(run_of(lanes=1), split, 4)] == [1, 1]
    with pytest.raises(ConfigError, match=r"--data\.lanes 2: recorded is read into memory, .*: leave it out$"):
        lanes_of_run(run_of(lanes=2), split, 4)


def test_a_run_reads_and_saves_its_lanes_and_goes_on_with_them(tmp_path, monkeypatch):
    """Before its first step, which would have to be compiled."""
    source = Recorded()
    monkeypatch.setattr("experiments.training.setup.load_split", lambda config, processes: split_of(source))
    arguments = [*SMALL, "--estimator", "uniform", "--batch", "8", "--data.lanes", "4", "--out", str(tmp_path)]
    config = parse([*arguments, "--dataset", "recorded"])
    setup = set_up(config)
    prepare_new(config)
    session = Session(config, setup, tmp_path, Display())
    session.save()
    session.close()
    going_on = parse(["--resume", "--out", str(tmp_path)])
    assert going_on.data.lanes == setup.lanes == set_up(going_on).lanes == 4
    saved = json.loads((tmp_path / "checkpoints" / "0" / "meta" / "metadata").read_text())["data"]
    assert (saved["lane_count"], [*saved["lanes"]]) == (4, ["0", "1", "2", "3"])
    with pytest.raises(DataError, match=r"go on with --data\.lanes 4$"):
        Session(going_on, dataclasses.replace(setup, lanes=2), tmp_path, Display())
    again = Session(going_on, setup, tmp_path, Display())
    assert again.step == 0
    again.close()
