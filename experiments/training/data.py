"""The data of a run, and what is said of it while it trains: how often it was gone through, and how much of it can be shown."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from data import AbstractSource, Batch, Batches, FixedSplits, Row, Split, load, open_source
from data.coverage import LITTLE
from data.lanes import most_lanes, require_lanes
from data.places import Reading, merged, reading_of
from experiments.config.errors import require
from experiments.config.sections import DataConfig
from experiments.config.settings import RunConfig
from experiments.processes.processes import ALONE, AbstractProcesses
from experiments.training.metrics_log import read_metrics

EPOCHS, SHOWN = "epochs", "shown_fraction"
"""What metrics and summaries call them."""


def open_data(dataset: str, data: DataConfig) -> AbstractSource:
    """The training text of a run on `dataset`, with its validation and test text where they are settled. Raises `DataError`."""

    def opened(name: str) -> AbstractSource:
        return open_source(
            name, text_field=data.text_field, cache=data.cache, cache_bytes=round(data.cache_gib * 2**30)
        )

    training = opened(data.train or dataset)
    if data.valid is None and data.test is None:
        return training
    valid, test = (None if name is None else opened(name) for name in (data.valid, data.test))
    return FixedSplits(training.name, training, valid, test)


def load_split(config: RunConfig, processes: AbstractProcesses = ALONE) -> Split:
    """The data of a run. Of several `processes` the first reads what is held out of a stream, for all. Raises `DataError`."""
    data = config.data
    source = open_data(config.dataset, data)
    return load(
        source,
        length=config.length,
        protocol=data.protocol,
        held_out_share=data.held_out,
        held_out_bytes=config.evaluation.bytes,
        once=None if processes.count == 1 else processes.once,
    )


def lanes_of_run(config: RunConfig, split: Split, processes: int) -> int:
    """Into how many lanes the stream of a run is divided, that so many processes with rows of their own train; 1 for text in
    memory.

    A run that goes on keeps its number, which is 1 where none was written down. Raises `ConfigError` and `DataError` where the
    data cannot be divided as asked.
    """
    asked, streamed = config.data.lanes, split.training is None
    require(
        streamed or asked in (None, 1),
        f"--data.lanes {asked}: {split.source.name} is read into memory, where each process makes its own rows: leave it out",
    )
    shards = len(split.source.shards())
    if streamed and asked is not None:
        require_lanes(asked, config.batch, shards, split.source.name)
        return asked
    # Rows of tokens are as long as the longest, so that every process reads all of them.
    together = not streamed or config.resume or config.reads_tokens
    return 1 if together else most_lanes(config.batch, min(processes, shards))


def with_lanes(config: RunConfig, lanes: int) -> RunConfig:
    """A run with the number of lanes that was decided. One is not written down: it is what a run without a number has."""
    if lanes == 1:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, lanes=lanes))


def text_of(batch: Row | Batch) -> dict[str, np.ndarray]:
    """What a model reads of a row or a batch of text."""
    return {"bytes": batch["bytes"], "segments": batch["segments"], "mask": batch["mask"]}


def state_of_all(state: dict[str, object], processes: AbstractProcesses) -> dict[str, object]:
    """The state of the data of a run, whose lanes are read by several processes. Each gives the `Batches.state` that it has."""
    if processes.count == 1 or "lanes" not in state:
        return state
    return merged([json.loads(said) for said in processes.said(json.dumps(state))])


def reading_of_all(batches: Batches, processes: AbstractProcesses) -> Reading:
    """What all processes have read of the data. Each of them calls this."""
    state = batches.state()
    whole = state_of_all(state, processes)
    return batches.reading if whole is state else reading_of(whole)


def data_record(read: Reading) -> dict[str, float | int | None]:
    """What a record of `metrics.jsonl` has of the data: the epochs, and the share of the coverage."""
    coverage = read.coverage
    return {EPOCHS: read.epochs, SHOWN: None if coverage is None else coverage.share}


def latest(folder: Path, name: str) -> float | None:
    """The last number called `name` in the metrics of a run; None where there is none."""
    values = [value for record in read_metrics(folder) if isinstance(value := record.get(name), float)]
    return values[-1] if values else None


class DataNotes:
    """Sentences about the data of a run, each said once, when it becomes true."""

    def __init__(self, split: Split, batches: Batches):
        """`batches`: where the run goes on from. What `Split.notes` say is not said again."""
        self._split = split
        self._again = batches.epochs >= 1.0
        # Of a stream it is said at its first batches, and again should it turn out to be little.
        self._said = split.coverage is not None
        self._said_little = split.coverage is not None
        self._source_notes = set(split.notes)

    def after(self, step: int, total: int, read: Reading) -> list[str]:
        """What is to be said after `step` of `total`, with which so much was read."""
        notes = []
        coverage = read.coverage
        if coverage is not None:
            little = coverage.share < LITTLE
            if not self._said or (little and not self._said_little):
                notes.append(self._split.coverage_note(coverage))
                self._said, self._said_little = True, little
        again = read.epochs >= 1.0 and step < total and not self._again
        if self._split.training is None and (again or step == total):
            # What a stream leaves out is counted while it is read.
            notes += [note for note in self._split.source.notes if note not in self._source_notes]
            self._source_notes.update(notes)
        if again:
            self._again = True
            notes.append(
                f"step {step}: all training text of {self._split.source.name} that can be shown has been gone through once; a "
                f"second epoch begins"
            )
        return notes
