"""Batches from a source: splitting, shuffling, and an iterator that can resume at any step."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import NotRequired, TypedDict

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset
from jaxtyping import Bool, Float64, Int32, Int64, UInt8

from data.coverage import LITTLE, Coverage
from data.documents import AbstractSource, DataError, document_rank
from data.rows import HeldOutRows, MemoryRows, Protocol, Row
from data.stream import StreamRows, stream_held_out
from data.stream_batches import StreamBatches
from data.texts import Texts


class Batch(TypedDict):
    """A batch of rows (training sequences): bytes, segment numbers of the documents in each row, and a mask that is False at
    padding."""

    bytes: UInt8[np.ndarray, "batch length"]
    segments: Int32[np.ndarray, "batch length"]
    mask: Bool[np.ndarray, "batch length"]


class ReadBatch(Batch):
    """A batch from the data pipeline; batches of a stream also have the additional fields of `StreamedBatch`."""

    epochs: NotRequired[Float64[np.ndarray, " batch"]]
    earlier_rows: NotRequired[Int64[np.ndarray, " batch"]]
    coverage: NotRequired[Int64[np.ndarray, "batch 4"]]
    state: NotRequired[dict[str, object]]


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


def load(
    source: AbstractSource, *, length: int, protocol: Protocol, held_out_share: float, held_out_bytes: int
) -> Split:
    """Split a source by document into training and held-out text.

    If the data set has a held-out split, only that split is held out. Otherwise a document is held out if its rank, a hash of
    its content in [0, 1), is below `held_out_share`. A held-out split or a stream is read only until its held-out documents
    fill rows of `held_out_bytes`. Raises `DataError` if the source cannot be read or has too little text.
    """
    training: Texts | None = None
    held_out: Sequence[bytes]
    notes: list[str] = []
    separate = source.held_out_source
    if not source.streamed:
        training = Texts.of(document for shard in source.shards() for document in source.documents(shard))
    if separate is not None:
        held_out = stream_held_out(separate, 1.0, held_out_bytes, length, protocol)
        held_out_share = 0.0
    elif training is None:
        held_out = stream_held_out(source, held_out_share, held_out_bytes, length, protocol)
        notes.append(
            f"{100 * held_out_share:.3g} % of the documents of {source.name} are held out (--data.held-out); validation uses the "
            f"first {len(held_out):,} of them"
        )
    else:
        training, held_out = split_documents(training, held_out_share, source.name)
    rows = MemoryRows(held_out, length, protocol, random=False)
    notes += source.notes
    coverage = None
    if training is not None:
        coverage = Coverage.of(training.sizes - 1, length, protocol)
        if coverage.documents == 1 and coverage.share < LITTLE:
            raise DataError(
                f"{source.name} is one document, and the protocol '{protocol}' shows only its first {length} bytes; use "
                "--data.protocol crop"
            )
        if coverage.shown == 0:
            raise DataError(
                f"no document of {source.name} has {length} bytes or more; use a smaller --length or --data.protocol crop"
            )
        notes.append(coverage.note(source.name, length, protocol, so_far=False))
    if len(rows) == 0:
        raise DataError(
            f"no held-out document of {source.name} has {length} bytes or more; use a smaller --length or --data.protocol crop"
        )
    if rows.dropped:
        notes.append(
            f"{rows.dropped:,} of {len(held_out):,} held-out documents of {source.name} are shorter than {length} bytes and not "
            "evaluated"
        )
    if len(rows) < held_out_bytes // length:
        notes.append(
            f"validation uses all held-out text of {source.name}, {len(rows):,} rows of {length} bytes; --evaluation.bytes "
            f"asks for {held_out_bytes // length:,}"
        )
    digest = hashlib.blake2b(digest_size=8)
    for document in held_out if training is None else itertools.chain(training, held_out):
        digest.update(len(document).to_bytes(8, "big"))
        digest.update(document)
    for shard in source.shards():
        # Names of files need not be UTF-8.
        digest.update(f"{shard.name.rsplit('/', 1)[-1]}:{shard.size}".encode("utf-8", "surrogatepass"))
    fingerprint = digest.hexdigest()
    return Split(source, length, protocol, held_out_share, training, coverage, rows, fingerprint, tuple(notes))


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

    `epochs`: the number of epochs so far. Its fraction counts rows; for a stream, whose number of rows is unknown, it counts
    the stored sizes of completed shards. `coverage`: the coverage of the training documents; for a stream, of the documents
    read so far (None before the first).
    """

    epochs: float
    coverage: Coverage | None

    def __init__(
        self,
        iterator: grain.DatasetIterator[ReadBatch],
        *,
        rows_per_epoch: int | None,
        step: int,
        epochs: float,
        coverage: Coverage | None,
        batch: int,
        rows: slice | None,
        stream: dict[str, object] | None = None,
    ):
        """`rows_per_epoch`: None for a stream. `step`, `epochs`, `coverage` and the state of the `stream`: the values at the
        start; a stream has no state before its first batch. `batch`: rows of a batch, of which `rows` are returned; None for
        all."""
        self._iterator = iterator
        self._rows_per_epoch = rows_per_epoch
        self._batch, self._rows = batch, rows
        self._step = step
        self._stream = stream
        self._begun = False
        self.epochs, self.coverage = epochs, coverage

    def __next__(self) -> Batch:
        batch = self._next_read()
        self._step += 1
        if self._rows_per_epoch is not None:
            self.epochs = self._step * self._batch / self._rows_per_epoch
        elif "epochs" in batch and "earlier_rows" in batch and "coverage" in batch and "state" in batch:
            self._stream = batch["state"]
            # The shuffle buffer reads ahead: more rows may precede the latest shard than have been returned.
            returned, earlier = self._step * self._batch, int(batch["earlier_rows"].max())
            self.epochs = max(self.epochs, float(batch["epochs"].max()) * min(1.0, returned / max(1, earlier)))
            counts = Coverage(*(int(count) for count in batch["coverage"].max(axis=0)))
            # There is no coverage before the first document has been counted.
            if counts.bytes and (self.coverage is None or counts.bytes > self.coverage.bytes):
                self.coverage = counts
        rows = slice(None) if self._rows is None or self._rows_per_epoch is not None else self._rows
        return Batch(bytes=batch["bytes"][rows], segments=batch["segments"][rows], mask=batch["mask"][rows])

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
        """The number of batches so far, the epochs and, for a stream, its state."""
        return {"step": self._step, "epochs": self.epochs, "stream": self._stream}

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
) -> Batches:
    """Shuffled batches. They depend on the seed and not on the number of worker processes.

    `rows`: those of each batch that this process trains on, if others train on the rest of the same batches; None for all. Only
    these are made of text in memory. A stream is read whole by each process: its order is one, and its state the same everywhere.

    Rows in memory are reshuffled every epoch; packed rows keep their contents. Streamed rows are shuffled within a buffer.
    `state`: a result of `Batches.state` to resume from, with any number of workers.
    """
    step, epochs = 0, 0.0
    if state is not None and isinstance(state["step"], int):
        step = state["step"]
    # States saved by earlier versions have no epochs.
    if state is not None and isinstance(saved_epochs := state.get("epochs"), float):
        epochs = saved_epochs
    rows_per_epoch, stream = None, None
    if split.training is None:
        if state is not None and isinstance(state["stream"], dict):
            stream = _of_all_workers(state["stream"])
        streamed = StreamRows(split.source, split.length, split.protocol, split.held_out_share, seed)
        dataset = ThreadPrefetchIterDataset(StreamBatches(streamed, batch, stream), prefetch_buffer_size=4)
    else:
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
        epochs = step * batch / rows_per_epoch
    if workers:
        _parse_worker_flags()
        # Otherwise it starts with the first worker, and lets SIGINT through again.
        resource_tracker.ensure_running()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return Batches(
        iter(dataset),
        rows_per_epoch=rows_per_epoch,
        step=step,
        epochs=epochs,
        coverage=split.coverage,
        batch=batch,
        rows=rows,
        stream=stream,
    )


def _of_all_workers(state: dict[str, object]) -> dict[str, object]:
    """The state of a stream, which earlier versions saved as that of their only worker process."""
    workers = state.get("iterators_in_use_states")
    return workers[0] if isinstance(workers, list) else state


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
