"""Batches from a source: splitting, shuffling, and an iterator that can resume at any step."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import NotRequired

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset

from data.coverage import LITTLE, Coverage
from data.documents import AbstractSource, DataError, document_rank
from data.lanes import Lane, lanes_of, require_lanes
from data.places import Places, Reading
from data.rows import HeldOutRows, MemoryRows, Protocol, Row
from data.stream import StreamRows, stream_held_out
from data.stream_batches import Batch, LaneBatches, ReadLane, StreamBatches
from data.texts import Texts, packed, unpacked


class ReadBatch(Batch):
    """A batch from the data pipeline; for one of a stream, also what is said of its lanes."""

    lanes: NotRequired[list[ReadLane]]


@dataclass(frozen=True)
class Split:
    """A source split into training documents and held-out rows.

    `training`: the training documents; None if streamed. `coverage`: the coverage of the training documents; None if streamed.
    `fingerprint`: a hash of the data. `notes`: messages to the user about coverage and omitted text.
    """

    source: AbstractSource
    length: int
    protocol: Protocol
    held_out_share: float
    training: Texts | None
    coverage: Coverage | None
    held_out: MemoryRows
    fingerprint: str
    notes: tuple[str, ...]

    def coverage_note(self, coverage: Coverage) -> str:
        """A note to the user about the training documents counted in `coverage`."""
        return coverage.note(self.source.name, self.length, self.protocol, so_far=self.training is None)

    def held_out_rows(self, max_bytes: int) -> HeldOutRows:
        """Held-out rows of up to `max_bytes`, at least one, made lazily. They do not depend on the seed of a run."""
        order = np.random.default_rng(0).permutation(len(self.held_out))
        return HeldOutRows(self.held_out, order[: max(1, max_bytes // self.length)])


Once = Callable[[Callable[[], bytes]], bytes]
"""Returns what a function makes, of the several processes that call it one for all."""


def load(
    source: AbstractSource,
    *,
    length: int,
    protocol: Protocol,
    held_out_share: float,
    held_out_bytes: int,
    once: Once | None = None,
) -> Split:
    """Split a source by document into training and held-out text.

    If the data set has a held-out split, only that split is held out. Otherwise a document is held out if its rank, a hash of
    its content in [0, 1), is below `held_out_share`. A held-out split or a stream is read only until its held-out documents
    fill rows of `held_out_bytes`, of several processes by the first alone (`once`). Raises `DataError` if the source cannot be
    read or has too little text.
    """

    def begun(read: AbstractSource, share: float) -> Sequence[bytes]:
        def made() -> Sequence[bytes]:
            return stream_held_out(read, share, held_out_bytes, length, protocol)

        return made() if once is None else unpacked(once(lambda: packed(made())))

    training: Texts | None = None
    held_out: Sequence[bytes]
    notes: list[str] = []
    separate = source.held_out_source
    if not source.streamed:
        training = Texts.of(document for shard in source.shards() for document in source.documents(shard))
    if separate is not None:
        held_out = begun(separate, 1.0)
        held_out_share = 0.0
    elif training is None:
        held_out = begun(source, held_out_share)
        notes.append(
            f"{100 * held_out_share:.3g} % of the documents of {source.name} are held out (--data.held-out); validation uses the "
            f"first {len(held_out):,} of them"
        )
    else:
        training, held_out = split_documents(training, held_out_share, source.name)
    notes += source.notes
    coverage = None if training is None else _covered(training, source.name, length, protocol)
    if coverage is not None:
        notes.append(coverage.note(source.name, length, protocol, so_far=False))
    rows = MemoryRows(held_out, length, protocol, random=False)
    notes += _row_notes(rows, len(held_out), source.name, length, held_out_bytes)
    fingerprint = _fingerprint(source, held_out if training is None else itertools.chain(training, held_out))
    return Split(source, length, protocol, held_out_share, training, coverage, rows, fingerprint, tuple(notes))


def _covered(training: Texts, name: str, length: int, protocol: Protocol) -> Coverage:
    """How much of the training text a protocol can show. Raises `DataError` where that is next to nothing."""
    coverage = Coverage.of(training.sizes - 1, length, protocol)
    if coverage.documents == 1 and coverage.share < LITTLE:
        raise DataError(
            f"{name} is one document, and the protocol '{protocol}' shows only its first {length} bytes; use "
            "--data.protocol crop"
        )
    if coverage.shown == 0:
        raise DataError(
            f"no document of {name} has {length} bytes or more; use a smaller --length or --data.protocol crop"
        )
    return coverage


def _row_notes(rows: MemoryRows, documents: int, name: str, length: int, asked: int) -> list[str]:
    """What a user should know of the rows of so many held-out documents, of which `asked` bytes were wanted. Raises `DataError`
    if there are none."""
    if len(rows) == 0:
        raise DataError(
            f"no held-out document of {name} has {length} bytes or more; use a smaller --length or --data.protocol crop"
        )
    notes = []
    if rows.dropped:
        notes.append(
            f"{rows.dropped:,} of {documents:,} held-out documents of {name} are shorter than {length} bytes and not "
            "evaluated"
        )
    if len(rows) < asked // length:
        notes.append(
            f"validation uses all held-out text of {name}, {len(rows):,} rows of {length} bytes; --evaluation.bytes "
            f"asks for {asked // length:,}"
        )
    return notes


def _fingerprint(source: AbstractSource, documents: Iterable[bytes]) -> str:
    """A hash of the documents, and of the names and sizes of the source's shards."""
    digest = hashlib.blake2b(digest_size=8)
    for document in documents:
        digest.update(len(document).to_bytes(8, "big"))
        digest.update(document)
    for shard in source.shards():
        # Names of files need not be UTF-8.
        digest.update(f"{shard.name.rsplit('/', 1)[-1]}:{shard.size}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def split_documents(documents: Iterable[bytes], share: float, name: str) -> tuple[Texts, Texts]:
    """Training and held-out documents. Each has at least one document, and no document is in both.

    Raises `DataError` if there are fewer than two distinct documents.
    """
    texts = Texts.of(documents)
    ranks = np.fromiter(map(document_rank, texts), np.float64, len(texts))
    distinct = len(np.unique(ranks))
    if distinct < 2:
        raise DataError(
            f"{name} has {distinct} distinct document(s); two are needed, one of them to hold out; name more text, "
            "such as a folder of several files"
        )
    least = float(ranks.min())
    threshold = share if least < share else float(np.nextafter(least, 1.0))
    threshold = min(threshold, float(ranks.max()))
    return texts.take(np.flatnonzero(ranks >= threshold)), texts.take(np.flatnonzero(ranks < threshold))


class WorkerError(DataError):
    """A process that prepares batches was ended from outside."""


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """SIGINT waits until the end of the block; in processes that start inside it for ever."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Batches(Iterator[Batch]):
    """An infinite iterator over training batches. `state` returns the position as plain JSON; `open_batches` resumes from it.

    `reading`: how much has been read so far. The fraction of its epochs counts rows; for a stream, whose number of rows is
    unknown, it counts the stored sizes of completed shards. A process that reads some lanes of a stream knows of those alone.
    """

    reading: Reading

    def __init__(
        self,
        iterator: grain.DatasetIterator[ReadBatch],
        *,
        rows_per_epoch: int | None,
        step: int,
        reading: Reading,
        batch: int,
        rows: slice | None = None,
        places: Places | None = None,
    ):
        """`rows_per_epoch`: None for a stream. `step`, `reading` and the `places` in a stream: the values at the start. `batch`:
        rows of a batch. `rows`: which of those that are read of it are returned; None for all."""
        self._iterator = iterator
        self._rows_per_epoch = rows_per_epoch
        self._batch, self._rows = batch, rows
        self._step = step
        self._places = places
        self._begun = False
        self.reading = reading

    def __next__(self) -> Batch:
        batch = self._next_read()
        self._step += 1
        if self._rows_per_epoch is not None:
            self.reading = Reading(self._step * self._batch / self._rows_per_epoch, self.reading.coverage)
        elif self._places is not None and "lanes" in batch:
            self._places.advance(batch["lanes"], self._step * self._batch // self._places.count)
            self.reading = self._places.reading
        rows = slice(None) if self._rows is None else self._rows
        return Batch(bytes=batch["bytes"][rows], segments=batch["segments"][rows], mask=batch["mask"][rows])

    @property
    def epochs(self) -> float:
        """The number of epochs so far."""
        return self.reading.epochs

    @property
    def coverage(self) -> Coverage | None:
        """The coverage of the training documents; for a stream, of the documents read so far (None before the first)."""
        return self.reading.coverage

    def _next_read(self) -> ReadBatch:
        try:
            if self._begun:
                return next(self._iterator)
            # Worker processes start here, and keep what is held back: Ctrl-C in a terminal is sent to all processes.
            with _interrupts_held_back():
                batch = next(self._iterator)
            self._begun = True
            return batch
        except RuntimeError as error:
            found = re.search(r"Worker process was terminated.* exit code (-?\d+)", str(error))
            if found is None:
                raise
            raise WorkerError(
                f"a process that prepares batches was ended from outside (exit code {found[1]}), as where memory runs out: go on "
                "with fewer --data.workers"
            ) from None

    def state(self) -> dict[str, object]:
        """The number of batches so far, the epochs and, for a stream, its state, or those of the lanes that are read here."""
        stream = {"stream": None} if self._places is None else self._places.state()
        return {"step": self._step, "epochs": self.epochs, **stream}

    def close(self) -> None:
        """Stops the threads and processes of the data pipeline."""
        self._iterator.close()


def open_batches(
    split: Split,
    *,
    batch: int,
    seed: int,
    workers: int = 0,
    state: dict[str, object] | None = None,
    rows: slice | None = None,
    lanes: int = 1,
) -> Batches:
    """Shuffled batches. They depend on the seed and not on the number of worker processes.

    `rows`: those of each batch that this process trains on, if others train on the rest of the same batches; None for all. Only
    these are made of text in memory. Of a stream in several `lanes`, only the shards of those are read that these rows come
    from; one lane is the whole stream. Another number of lanes makes other batches of the same text; of text in memory it
    changes nothing.

    Rows in memory are reshuffled every epoch; packed rows keep their contents. Streamed rows are shuffled within a buffer.
    `state`: a result of `Batches.state` to resume from, or `places.merged` of those of several processes, with any number of
    workers or processes. Raises `DataError` where the stream cannot be divided so, or the state is that of another number of
    lanes.
    """
    step = state["step"] if state is not None and isinstance(state["step"], int) else 0
    if split.training is None:
        return _streamed_batches(split, batch, seed, workers, state, step, rows, lanes)
    memory = MemoryRows(split.training, split.length, split.protocol, random=True, order_seed=seed)
    rows_per_epoch = len(memory)
    # Batches are formed before they are distributed, so that they do not depend on the number of workers.
    # The number of repeats is finite but never reached: grain cannot make batches of size 1 from an infinite data set.
    repeated = grain.MapDataset.source(memory).shuffle(seed=seed).repeat(2**60 // len(memory))
    batches = repeated.random_map(memory.row, seed=(seed + 1) % 2**32)
    own = batch if rows is None else rows.stop - rows.start
    if rows is not None:
        batches = grain.MapDataset.source(_RowsOfBatches(batches, batch, rows))
    dataset = batches.batch(own)[step:].to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    return Batches(
        iter(_with_workers(dataset, workers)),
        rows_per_epoch=rows_per_epoch,
        step=step,
        reading=Reading(step * batch / rows_per_epoch, split.coverage),
        batch=batch,
    )


def _streamed_batches(
    split: Split,
    batch: int,
    seed: int,
    workers: int,
    state: dict[str, object] | None,
    step: int,
    rows: slice | None,
    lanes: int,
) -> Batches:
    """`open_batches` of a stream, after `step` batches."""
    require_lanes(lanes, batch, len(split.source.shards()), split.source.name)
    own, each = lanes_of(lanes, batch, rows), batch // lanes
    places = Places.of(lanes, own, state)
    opened = []
    for index, place in places.lanes.items():
        lane = Lane(index, lanes)
        streamed = StreamRows(split.source, split.length, split.protocol, split.held_out_share, seed, lane)
        opened.append(StreamBatches(streamed, each, place.stream))
    dataset = ThreadPrefetchIterDataset(LaneBatches(opened), prefetch_buffer_size=4)
    first = own.start * each
    return Batches(
        iter(_with_workers(dataset, workers)),
        rows_per_epoch=None,
        step=step,
        reading=places.reading,
        batch=batch,
        rows=None if rows is None else slice(rows.start - first, rows.stop - first),
        places=places,
    )


def _with_workers(dataset: grain.IterDataset, workers: int) -> grain.IterDataset:
    """The same batches, prepared by so many worker processes."""
    if not workers:
        return dataset
    _parse_worker_flags()
    # Otherwise it starts with the first worker, and lets SIGINT through again.
    resource_tracker.ensure_running()
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))


class _RowsOfBatches:
    """Of a sequence of rows that is cut into batches the `rows` of each batch."""

    def __init__(self, sequence: grain.MapDataset[Row], batch: int, rows: slice):
        self._sequence, self._batch, self._rows = sequence, batch, rows

    def __len__(self) -> int:
        return len(self._sequence) // self._batch * (self._rows.stop - self._rows.start)

    def __getitem__(self, index: int) -> Row | None:
        number, row = divmod(index, self._rows.stop - self._rows.start)
        return self._sequence[number * self._batch + self._rows.start + row]


def _parse_worker_flags() -> None:
    """Marks absl flags as parsed. Worker processes read them and fail otherwise."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
