"""From a source to batches: the split, the shuffle, and an iterator that can go on from any step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset, WindowShuffleIterDataset
from jaxtyping import Bool, Float64, Int32, Int64, UInt8

from data.coverage import Coverage
from data.documents import AbstractSource, DataError, document_rank
from data.rows import HeldOutRows, MemoryRows, Protocol
from data.stream import StreamRows, stream_held_out

SHUFFLE_WINDOW = 1024
"""Rows of a streamed data set that are shuffled among each other."""


class Batch(TypedDict):
    """Rows stacked: bytes, document numbers, and which bytes are real."""

    bytes: UInt8[np.ndarray, "batch length"]
    segments: Int32[np.ndarray, "batch length"]
    mask: Bool[np.ndarray, "batch length"]


class ReadBatch(Batch):
    """A batch as it is read: of a stream, with what a `StreamedRow` says of each row."""

    epochs: NotRequired[Float64[np.ndarray, " batch"]]
    earlier_rows: NotRequired[Int64[np.ndarray, " batch"]]
    coverage: NotRequired[Int64[np.ndarray, "batch 4"]]


@dataclass(frozen=True)
class Split:
    """What `load` made of a source: the held-out rows, the training documents (None where they are streamed) and how much of
    them the protocol can show, a fingerprint that changes with the data, and sentences for the user about what is shown and
    what was left out."""

    source: AbstractSource
    length: int
    protocol: Protocol
    held_out_share: float
    training: Sequence[bytes] | None
    coverage: Coverage | None
    held_out: MemoryRows
    fingerprint: str
    notes: tuple[str, ...]

    def coverage_note(self, coverage: Coverage) -> str:
        """What to tell the user of the training documents that are counted in `coverage`."""
        return coverage.sentence(self.source.name, self.length, self.protocol, so_far=self.training is None)

    def held_out_rows(self, max_bytes: int) -> HeldOutRows:
        """Up to `max_bytes` of held-out rows, made when they are asked for: the same for every run on this data, whatever its
        seed."""
        order = np.random.default_rng(0).permutation(len(self.held_out))
        return HeldOutRows(self.held_out, order[: max(1, max_bytes // self.length)])


def load(
    source: AbstractSource, *, length: int, protocol: Protocol, held_out_share: float, held_out_bytes: int
) -> Split:
    """Split a source by document into training and held-out text.

    What is held out depends on each document's content alone: those of the lowest rank, `held_out_share` of them; of a
    streamed source, as many as give `held_out_bytes`; of a data set with a held-out split, that split and nothing else.
    Raises `DataError` where the source cannot be read or has too little.
    """
    training: list[bytes] | None = None
    notes: list[str] = []
    separate = source.held_out_source
    if not source.streamed:
        training = [document for shard in source.shards() for document in source.documents(shard)]
    if separate is not None:
        held_out = stream_held_out(separate, 1.0, held_out_bytes, length, protocol)
        held_out_share = 0.0
    elif training is None:
        held_out = stream_held_out(source, held_out_share, held_out_bytes, length, protocol)
        notes.append(
            f"{100 * held_out_share:.3g} % of the documents of {source.name} never train (--data.held-out); validation is on the "
            f"first {len(held_out):,} of them"
        )
    else:
        training, held_out = split_documents(training, held_out_share, source.name)
    rows = MemoryRows(held_out, length, protocol, random=False)
    notes += source.notes
    coverage = None
    if training is not None:
        coverage = Coverage()
        for document in training:
            coverage = coverage.plus(len(document), length, protocol)
        if coverage.shown == 0:
            raise DataError(
                f"no document of {source.name} has {length} bytes; use a smaller --length or --data.protocol crop"
            )
        notes.append(coverage.sentence(source.name, length, protocol, so_far=False))
    if len(rows) == 0:
        raise DataError(
            f"no held-out document of {source.name} has {length} bytes; use a smaller --length or --data.protocol crop"
        )
    if rows.dropped:
        notes.append(
            f"{rows.dropped:,} of {len(held_out):,} held-out documents of {source.name} are shorter than {length} bytes and not "
            "evaluated"
        )
    if len(rows) < held_out_bytes // length:
        notes.append(
            f"validation is on all the held-out text of {source.name}, {len(rows):,} rows of {length} bytes; --evaluation.bytes "
            f"asks for {held_out_bytes // length:,}"
        )
    digest = hashlib.blake2b(digest_size=8)
    for document in held_out if training is None else [*training, *held_out]:
        digest.update(len(document).to_bytes(8, "big"))
        digest.update(document)
    for shard in source.shards():
        digest.update(f"{shard.name.rsplit('/', 1)[-1]}:{shard.size}".encode())
    fingerprint = digest.hexdigest()
    return Split(source, length, protocol, held_out_share, training, coverage, rows, fingerprint, tuple(notes))


def split_documents(documents: Sequence[bytes], share: float, name: str) -> tuple[list[bytes], list[bytes]]:
    """Training and held-out documents; at least one different document on each side.

    Raises `DataError` where there are fewer than two different documents.
    """
    ranks = [document_rank(document) for document in documents]
    if len(set(ranks)) < 2:
        raise DataError(f"{name} holds {len(set(ranks))} different document(s); two are needed, one of them held out")
    threshold = share if min(ranks) < share else float(np.nextafter(min(ranks), 1.0))
    threshold = min(threshold, max(ranks))
    training = [document for document, rank in zip(documents, ranks, strict=True) if rank >= threshold]
    return training, [document for document, rank in zip(documents, ranks, strict=True) if rank < threshold]


def check_workers(split: Split, workers: int) -> None:
    """Raise `DataError` for more than one worker on a stream."""
    if split.training is None and workers > 1:
        raise DataError(f"{split.source.name} is streamed shard by shard, by one worker process at most; got {workers}")


class Batches(Iterator[Batch]):
    """Training batches without end. `state` tells where it stands, in plain JSON, and `open_batches` goes on from there.

    `epochs`: how often the data had been gone through after the latest batch: rows out of those of an epoch; of a stream,
    whose rows nobody has counted, whole shards by their stored size. `coverage`: of the training documents; of a stream, of
    those read so far, None before there are any.
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
    ):
        """`rows_per_epoch` None: of a stream. `step`, `epochs`, `coverage`: where it stands."""
        self._iterator = iterator
        self._rows_per_epoch = rows_per_epoch
        self._step = step
        self.epochs, self.coverage = epochs, coverage

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._step += 1
        if self._rows_per_epoch is not None:
            self.epochs = self._step * len(batch["bytes"]) / self._rows_per_epoch
        elif "epochs" in batch and "earlier_rows" in batch and "coverage" in batch:
            # Rows are shuffled: the furthest that was read may be ahead of how many were handed out.
            handed_out, ahead = self._step * len(batch["bytes"]), int(batch["earlier_rows"].max())
            self.epochs = max(self.epochs, float(batch["epochs"].max()) * min(1.0, handed_out / max(1, ahead)))
            counts = Coverage(*(int(count) for count in batch["coverage"].max(axis=0)))
            # Before the first document is counted there is nothing to say.
            if counts.bytes and (self.coverage is None or counts.bytes > self.coverage.bytes):
                self.coverage = counts
        return Batch(bytes=batch["bytes"], segments=batch["segments"], mask=batch["mask"])

    def state(self) -> dict[str, object]:
        """After how many batches it stands and, of a stream, where in the shards."""
        stream = self._iterator.get_state() if self._rows_per_epoch is None else None
        return {"step": self._step, "epochs": self.epochs, "stream": stream}

    def close(self) -> None:
        """Stop its threads and processes."""
        self._iterator.close()


def open_batches(
    split: Split, *, batch: int, seed: int, workers: int = 0, state: dict[str, object] | None = None
) -> Batches:
    """Shuffled batches, the same for the same seed whatever the number of worker processes.

    Rows in memory are shuffled anew every epoch (packed rows stay as they are packed), streamed rows within a window.
    `state` is what `Batches.state` returned. Raises `DataError` for more than one worker on a stream, whose shards are read
    one after another.
    """
    step, epochs = 0, 0.0
    if state is not None and isinstance(state["step"], int):
        step = state["step"]
    # A state from before epochs were counted has none.
    if state is not None and isinstance(passed := state.get("epochs"), float):
        epochs = passed
    check_workers(split, workers)
    rows_per_epoch = None
    if split.training is None:
        stream = StreamRows(split.source, split.length, split.protocol, split.held_out_share, seed)
        dataset = WindowShuffleIterDataset(stream, window_size=SHUFFLE_WINDOW, seed=seed).batch(batch)
        dataset = ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=4)
    else:
        rows = MemoryRows(split.training, split.length, split.protocol, random=True, order_seed=seed)
        rows_per_epoch = len(rows)
        # Batches are made before the work is dealt out, so that the number of workers cannot change them.
        # As good as without end, which grain cannot cut into batches of one.
        repeated = grain.MapDataset.source(rows).shuffle(seed=seed).repeat(2**60 // len(rows))
        batches = repeated.random_map(rows.row, seed=seed + 1)
        dataset = batches.batch(batch)[step:].to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
        epochs = step * batch / rows_per_epoch
    if workers:
        _parse_worker_flags()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    iterator = iter(dataset)
    if state is not None and isinstance(state["stream"], dict):
        iterator.set_state(state["stream"])
    return Batches(iterator, rows_per_epoch=rows_per_epoch, step=step, epochs=epochs, coverage=split.coverage)


def _parse_worker_flags() -> None:
    """Worker processes read absl flags, which fail unless somebody has declared them parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
