"""Speed of the data pipeline: training rows from files of each kind, in memory and streamed, by one process and several."""

from __future__ import annotations

import gzip
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from data import Protocol, load, open_batches, open_source
from data.documents import AbstractSource
from data.files import Files, read_documents
from estimators.bounds import Length, Sequences, Within
from experiments.benchmark.measurement import AbstractMeasurement
from experiments.config.errors import require_bounds
from experiments.launch import own_cores
from experiments.reporting.display import Display
from experiments.reporting.markdown import table

HELD_OUT = 0.05
"""Share of the documents that is held out."""

LARGE = 2**62
"""A limit that no text exceeds, so that all of it is in memory."""


@dataclass(frozen=True)
class Pipeline:
    """MB of text a second, each for one file.

    `reading`: documents from the file, per second of one core. `starting`: all that is done before the first batch with the
    text in memory, the same. `memory`, `streamed`: training rows, per second of one core (all threads of the process counted).
    `by_workers`: training rows of the stream per second of the clock, by the number of worker processes.
    """

    reading: float
    starting: float
    memory: float
    streamed: float
    by_workers: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Data(AbstractMeasurement):
    """How fast training rows come from JSON lines (compressed too), Parquet and plain text, in memory and streamed."""

    dataset: str = "docs"
    """Text to work on: anything that --dataset of experiments.run takes. It is written to files of each kind."""
    megabytes: Annotated[float, Within(0.001, 10_000.0)] = 20.0
    """Text in each file, in millions of bytes; shorter text is repeated."""
    protocol: Protocol = "pack"
    """How documents become rows."""
    length: Length = 4096
    """Bytes of a row."""
    batch: Sequences = 16
    """Rows of a batch."""
    workers: tuple[Annotated[int, Within(0, 256)], ...] = (0, 1, 2)
    """Numbers of worker processes to compare on the stream."""
    seconds: Annotated[float, Within(0.001, 1000.0)] = 3.0
    """How long each measurement takes, at least."""

    def __post_init__(self):
        require_bounds(self)

    def measure(self, display: Display) -> dict[str, Pipeline]:
        found, rows = {}, []
        with tempfile.TemporaryDirectory() as folder:
            files = write_files(open_source(self.dataset), Path(folder), round(self.megabytes * 1e6))
            for kind, path in files.items():
                display.note(f"rows of {self.length} bytes from {kind}")
                one = found[kind] = self._measured(path)
                speeds = one.reading, one.starting, one.memory, one.streamed, *one.by_workers.values()
                rows.append((kind, *(f"{speed:.1f}" for speed in speeds)))
        core = ("reading", "up to the first batch", "rows in memory", "rows of a stream")
        clock = (f"{workers} workers" for workers in self.workers)
        display.note(
            f"{table(['MB/s', *core, *clock], rows)}\nThe first four are per second of one core, the others of the clock, on "
            f"{own_cores()} cores.\n"
        )
        return found

    def _measured(self, path: Path) -> Pipeline:
        size = 0

        def read() -> None:
            nonlocal size
            size = sum(map(len, read_documents(path, "text")))

        reading = _seconds(read, time.process_time)

        def opened(limit: int) -> AbstractSource:
            return Files(str(path), "text", limit)

        started = time.process_time()
        memory = self._rows(opened(LARGE), 0, time.process_time)
        starting = time.process_time() - started - memory.seconds
        streamed = self._rows(opened(0), 0, time.process_time)
        by_workers = {str(workers): self._rows(opened(0), workers, time.perf_counter).speed for workers in self.workers}
        return Pipeline(size / reading / 1e6, size / starting / 1e6, memory.speed, streamed.speed, by_workers)

    def _rows(self, source: AbstractSource, workers: int, clock: Callable[[], float]) -> _Read:
        split = load(
            source, length=self.length, protocol=self.protocol, held_out_share=HELD_OUT, held_out_bytes=100_000
        )
        batches = open_batches(split, batch=self.batch, seed=0, workers=workers)
        try:
            # Worker processes are up with the first; what they have read ahead does not count either.
            for _ in range(4 * (workers + 1)):
                next(batches)
            count, started, until = 0, clock(), time.perf_counter() + self.seconds
            while time.perf_counter() < until:
                next(batches)
                count += 1
            seconds = clock() - started
        finally:
            batches.close()
        return _Read(seconds, count * self.batch * self.length / seconds / 1e6)


@dataclass(frozen=True)
class _Read:
    """The seconds that rows took, and their MB/s."""

    seconds: float
    speed: float


def _seconds(work: Callable[[], None], clock: Callable[[], float]) -> float:
    started = clock()
    work()
    return clock() - started


def write_files(source: AbstractSource, folder: Path, size: int) -> dict[str, Path]:
    """Files of each kind with the first `size` bytes of text of a source, which is repeated where it is shorter; by kind. There
    is no Parquet file where pyarrow is not installed. Raises `DataError`."""
    texts: list[str] = []
    left = size
    while left > 0:
        for shard in source.shards():
            for document in source.documents(shard):
                if left > 0:
                    texts.append(document.decode())
                    left -= len(document)
    lines = "".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(texts)).encode()
    files = {name: folder / f"text{name}" for name in (".jsonl", ".jsonl.gz", ".txt")}
    files[".jsonl"].write_bytes(lines)
    files[".jsonl.gz"].write_bytes(gzip.compress(lines, compresslevel=6))
    files[".txt"].write_text("\n".join(texts))
    if importlib.util.find_spec("pyarrow") is not None:
        files[".parquet"] = folder / "text.parquet"
        _write_parquet(files[".parquet"], texts)
    return files


def _write_parquet(path: Path, texts: Sequence[str]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": texts, "id": range(len(texts))}), path)
