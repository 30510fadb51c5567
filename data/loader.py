"""From a source to batches: the split, the shuffle, and an iterator that can go on from any step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import grain
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset, WindowShuffleIterDataset
from jaxtyping import Bool, Int32, UInt8

from data.documents import AbstractSource, DataError, document_rank, is_held_out
from data.rows import MemoryRows, Piece, Protocol, Row, cut_piece, make_row, pieces, with_bos

SHUFFLE_WINDOW = 1024
"""Rows of a streamed data set that are shuffled among each other."""


class Batch(TypedDict):
    """Rows stacked: bytes, document numbers, and which bytes are real."""

    bytes: UInt8[np.ndarray, "batch length"]
    segments: Int32[np.ndarray, "batch length"]
    mask: Bool[np.ndarray, "batch length"]


StreamState = dict[str, int]
"""Where a stream stands: the next row begins in this `epoch`, at this place of the epoch's order of shards (`shard`), in
this `document` of the shard, at this `piece` of it (for packing: at this byte)."""


@dataclass(frozen=True)
class Split:
    """What `load` made of a source: the held-out rows, the training documents (None where they are streamed), a
    fingerprint that changes with the data, and sentences for the user about what was left out."""

    source: AbstractSource
    length: int
    protocol: Protocol
    held_out_share: float
    training: Sequence[bytes] | None
    held_out: MemoryRows
    fingerprint: str
    notes: tuple[str, ...]

    def held_out_rows(self, max_bytes: int) -> list[Row]:
        """Up to `max_bytes` of held-out rows: the same for every run on this data, whatever its seed."""
        order = np.random.default_rng(0).permutation(len(self.held_out))
        return [self.held_out.row(int(index), None) for index in order[: max(1, max_bytes // self.length)]]


def load(
    source: AbstractSource, *, length: int, protocol: Protocol, held_out_share: float, held_out_bytes: int
) -> Split:
    """Split a source by document into training and held-out text.

    What is held out depends on each document's content alone: those of the lowest rank, `held_out_share` of them; of a
    streamed source, as many as give `held_out_bytes`; of a data set with a held-out split, that split. Raises `DataError`
    where the source cannot be read or has too little.
    """
    training: list[bytes] | None = None
    separate = source.held_out_source
    if separate is not None:
        held_out = _stream_held_out(separate, 1.0, held_out_bytes, length, protocol)
        held_out_share = 0.0
    elif source.streamed:
        held_out = _stream_held_out(source, held_out_share, held_out_bytes, length, protocol)
    else:
        documents = [document for shard in source.shards() for document in source.documents(shard)]
        training, held_out = split_documents(documents, held_out_share, source.name)
    rows = MemoryRows(held_out, length, protocol, random=False)
    notes = []
    if training is not None:
        trainable = MemoryRows(training, length, protocol, random=True)
        if trainable.dropped:
            notes.append(
                f"{trainable.dropped} of {len(training)} training documents of {source.name} are shorter than {length} "
                "bytes and left out by the protocol 'cut'"
            )
        if len(trainable) == 0:
            raise DataError(
                f"no document of {source.name} has {length} bytes; use a smaller --length or --data.protocol crop"
            )
    if len(rows) == 0:
        raise DataError(
            f"no held-out document of {source.name} has {length} bytes; use a smaller --length or --data.protocol crop"
        )
    digest = hashlib.blake2b(digest_size=8)
    for document in held_out if training is None else [*training, *held_out]:
        digest.update(len(document).to_bytes(8, "big"))
        digest.update(document)
    for shard in source.shards():
        digest.update(f"{shard.name.rsplit('/', 1)[-1]}:{shard.size}".encode())
    return Split(source, length, protocol, held_out_share, training, rows, digest.hexdigest(), tuple(notes))


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
    """Training batches without end. `state` tells where it stands, in plain JSON, and `open_batches` goes on from there."""

    def __init__(self, iterator: grain.DatasetIterator[Batch], streamed: bool, step: int):
        self._iterator = iterator
        self._streamed = streamed
        self._step = step

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._step += 1
        return batch

    def state(self) -> dict[str, object]:
        """After how many batches it stands and, of a stream, where in the shards."""
        stream = self._iterator.get_state() if self._streamed else None
        return {"step": self._step, "stream": stream}

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
    step = 0
    if state is not None and isinstance(state["step"], int):
        step = state["step"]
    check_workers(split, workers)
    if split.training is None:
        stream = StreamRows(split.source, split.length, split.protocol, split.held_out_share, seed)
        dataset = WindowShuffleIterDataset(stream, window_size=SHUFFLE_WINDOW, seed=seed).batch(batch)
        dataset = ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=4)
    else:
        rows = MemoryRows(split.training, split.length, split.protocol, random=True, order_seed=seed)
        # Batches are made before the work is dealt out, so that the number of workers cannot change them.
        # As good as without end, which grain cannot cut into batches of one.
        repeated = grain.MapDataset.source(rows).shuffle(seed=seed).repeat(2**60 // len(rows))
        batches = repeated.random_map(rows.row, seed=seed + 1)
        dataset = batches.batch(batch)[step:].to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    if workers:
        _parse_worker_flags()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    iterator = iter(dataset)
    if state is not None and isinstance(state["stream"], dict):
        iterator.set_state(state["stream"])
    return Batches(iterator, split.training is None, step)


class StreamRows(grain.IterDataset):
    """Rows of a streamed source, shard after shard in an order drawn anew every epoch, without the held-out documents."""

    def __init__(self, source: AbstractSource, length: int, protocol: Protocol, held_out_share: float, seed: int):
        super().__init__()
        self.source, self.length, self.held_out_share, self.stream_seed = source, length, held_out_share, seed
        self.protocol: Protocol = protocol

    def __iter__(self) -> _StreamIterator:
        return _StreamIterator(self)


class _StreamIterator(grain.DatasetIterator):
    def __init__(self, dataset: StreamRows):
        super().__init__()
        self._data = dataset
        self._state: StreamState = {"epoch": 0, "shard": 0, "document": 0, "piece": 0}
        self._rows = self._from(self._state)

    def __next__(self) -> Row:
        row, self._state = next(self._rows)
        return row

    def get_state(self) -> StreamState:
        return self._state.copy()

    def set_state(self, state: StreamState) -> None:
        self._state = state.copy()
        self._rows = self._from(self._state)

    def _from(self, state: StreamState) -> Iterator[tuple[Row, StreamState]]:
        """Rows from `state` on, each with the state in which the row after it begins."""
        data = self._data
        if data.protocol == "pack":
            return self._packed_from(state)
        return self._pieces_from(state)

    def _pieces_from(self, state: StreamState) -> Iterator[tuple[Row, StreamState]]:
        data = self._data
        for document, at in self._documents_from(state):
            cut = pieces(len(document), data.length, data.protocol, random=True)
            first = state["piece"] if _same_document(at, state) else 0
            for number in range(first, len(cut)):
                rng = np.random.default_rng([data.stream_seed, at["epoch"], at["shard"], at["document"], number])
                row = make_row([cut_piece(document, cut[number], rng)], data.length)
                yield row, {**at, "piece": number + 1}

    def _packed_from(self, state: StreamState) -> Iterator[tuple[Row, StreamState]]:
        length, parts, filled = self._data.length, [], 0
        for document, at in self._documents_from(state):
            begin = state["piece"] if _same_document(at, state) else 0
            while begin < len(document):
                piece = Piece(begin, min(begin + length - filled, len(document)))
                parts.append(cut_piece(document, piece, None))
                begin, filled = piece.stop, filled + piece.stop - begin
                if filled == length:
                    yield make_row(parts, length), {**at, "piece": begin}
                    parts, filled = [], 0

    def _documents_from(self, state: StreamState) -> Iterator[tuple[UInt8[np.ndarray, " size"], StreamState]]:
        data = self._data
        shards = data.source.shards()
        epoch, first_shard, first_document = state["epoch"], state["shard"], state["document"]
        found = first_shard > 0 or first_document > 0
        while True:
            order = np.random.default_rng([data.stream_seed, epoch]).permutation(len(shards))
            for place in range(first_shard, len(shards)):
                for number, document in enumerate(data.source.documents(shards[order[place]])):
                    if number < first_document or is_held_out(document, data.held_out_share):
                        continue
                    if data.protocol != "cut" or len(document) + 1 >= data.length:
                        found = True
                        yield with_bos(document), {"epoch": epoch, "shard": place, "document": number, "piece": 0}
                first_document = 0
            if not found:
                raise DataError(f"a whole pass over {data.source.name} found no document to train on")
            epoch, first_shard, found = epoch + 1, 0, False


def _same_document(at: StreamState, state: StreamState) -> bool:
    return all(at[key] == state[key] for key in ("epoch", "shard", "document"))


def _stream_held_out(
    source: AbstractSource, share: float, max_bytes: int, length: int, protocol: Protocol
) -> list[bytes]:
    """Held-out documents from the start of a stream, enough for `max_bytes` of rows."""
    held_out: list[bytes] = []
    size = 0
    for shard in source.shards():
        for document in source.documents(shard):
            if is_held_out(document, share):
                held_out.append(document)
                size += sum(
                    piece.stop - (piece.start or 0) for piece in pieces(len(document) + 1, length, protocol, False)
                )
                if size >= max_bytes:
                    return held_out
    if not held_out:
        raise DataError(f"{source.name} has no held-out document at a share of {share}; raise --data.held-out")
    return held_out


def _parse_worker_flags() -> None:
    """Worker processes read absl flags, which fail unless somebody has declared them parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
