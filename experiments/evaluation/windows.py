"""Windows over documents: every byte is predicted once, from at least a stated number of bytes before it.

A document of n bytes has n + 1 positions: BOS, then its bytes. The prediction at position i is of position i + 1. A window reads
up to `context` positions. The first window of a document begins at its BOS, each next one `stride` positions later, in the middle
of the document and without a BOS. A position counts in the first window that reads it. So every byte but the first
`context` ones of a document is predicted from between `context` - `stride` + 1 and `context` positions.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Key, UInt8

from estimators.base import BOS
from unet import UNet
from unet.decoding.boundaries import byte_pass
from unet.decoding.score import rate_of, with_enough_capacity
from unet.local_devices import LocalDevices

SHORTEST = 16
"""Windows are padded to `context`, or to a half, a quarter or an eighth of it, but not to less than this."""


@dataclass(frozen=True)
class Window:
    """The `number`-th window of a document. It reads the positions from `start` to `stop`; those from `counted` on count."""

    document: int
    number: int
    start: int
    counted: int
    stop: int


def windows_of(document: int, size: int, context: int, stride: int) -> Iterator[Window]:
    """The windows of a document of `size` bytes. Raises `ValueError` unless 1 ≤ `stride` ≤ `context`."""
    if not 1 <= stride <= context:
        raise ValueError(f"windows of {context} bytes can move by 1 to {context} bytes; got {stride}")
    counted = number = 0
    while counted < size + 1:
        start = number * stride
        stop = min(start + context, size + 1)
        yield Window(document, number, start, counted, stop)
        counted, number = stop, number + 1


def window_keys(seed: int, sample: int, windows: Sequence[Window]) -> Key[Array, " windows"]:
    """The keys that draw the boundaries of windows: that of the `seed`, with the sample, the document and the window folded in.

    A document in one window has the boundaries of `unet.score` with the key of its seed, sample and document.
    """
    of_sample = jax.random.fold_in(jax.random.key(seed), sample)
    numbers = np.array([(window.document, window.number) for window in windows], np.uint32)
    of_document = jax.vmap(jax.random.fold_in, (None, 0))(of_sample, numbers[:, 0])
    return jax.vmap(jax.random.fold_in)(of_document, numbers[:, 1])


@dataclass(frozen=True)
class PositionScores:
    """What a model computes at some positions.

    `log_prob`, `early_log_prob`: log-probability in nats of the next position's byte, from the model and from its early head
    (NaN without one); 0 at the last position of a document. `prob`: probability of a boundary of the outermost level (0 without
    a token level). `depth`: how many levels, counted from the outermost, closed a token. `forced`: a boundary is there because
    the window begins there. `most_likely`: the next position's byte is the most likely one (true at the last position of a
    document). `inner_prob`: probability of a boundary of each level inside the outermost; NaN where a level outside it closed no
    token.
    """

    log_prob: Float32[np.ndarray, " positions"]
    early_log_prob: Float32[np.ndarray, " positions"]
    prob: Float32[np.ndarray, " positions"]
    depth: UInt8[np.ndarray, " positions"]
    forced: Bool[np.ndarray, " positions"]
    most_likely: Bool[np.ndarray, " positions"]
    inner_prob: Float32[np.ndarray, "positions inner"]

    @classmethod
    def joined(cls, parts: Sequence[PositionScores]) -> PositionScores:
        """Several after one another."""
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in cls.__annotations__})


def padded_lengths(context: int) -> list[int]:
    """The lengths that windows are padded to, ascending: at most four, so that few programs are compiled."""
    return sorted({min(context, max(SHORTEST, -(-context // parts))) for parts in (1, 2, 4, 8)})


def score_windows(
    model: UNet,
    documents: Sequence[bytes],
    windows: Sequence[Window],
    keys: Key[Array, " windows"] | None,
    *,
    context: int,
    batch: int,
    advance: Callable[[int], None] = lambda positions: None,
) -> PositionScores:
    """The scores of the counted positions of `windows`, in order. No boundary is dropped.

    `keys` draw the boundaries of each window (None: greedy). `batch`: windows of `context` positions beside each other, or
    as many more of shorter ones. `advance` is told of the number of positions after each batch.
    """
    scored: dict[int, PositionScores] = {}
    devices = LocalDevices.of(batch, model)
    placed = devices.everywhere(model)
    for length, places in _by_length(windows, context, batch).items():
        rows = batch * (context // length)
        for first in range(0, len(places), rows):
            chosen = places[first : first + rows]
            # The last batch is filled up, so that one program serves all batches of a length.
            filled = chosen + chosen[:1] * (rows - len(chosen))
            some = [windows[place] for place in filled]
            own_keys = None if keys is None else keys[jnp.asarray(filled)]
            scored |= zip(chosen, _batch_scores(placed, documents, some, own_keys, length, devices), strict=False)
            advance(sum(windows[place].stop - windows[place].counted for place in chosen))
    return PositionScores.joined([scored[place] for place in range(len(windows))])


def _by_length(windows: Sequence[Window], context: int, batch: int) -> dict[int, list[int]]:
    """The places of the windows that are padded to each length. Fewer than one batch of a length are padded further instead,
    which is cheaper than another program."""
    lengths = padded_lengths(context)
    groups: dict[int, list[int]] = {length: [] for length in lengths}
    for place, window in enumerate(windows):
        groups[next(length for length in lengths if length >= window.stop - window.start)].append(place)
    for length, longer in itertools.pairwise(lengths):
        if len(groups[length]) < batch * (context // length):
            groups[longer] += groups.pop(length)
    return groups


def _batch_scores(
    model: UNet,
    documents: Sequence[bytes],
    windows: Sequence[Window],
    keys: Key[Array, " batch"] | None,
    length: int,
    devices: LocalDevices,
) -> list[PositionScores]:
    # The last column is only predicted, not read.
    bytes = np.zeros((len(windows), length + 1), np.int32)
    mask = np.zeros(bytes.shape, bool)
    for row, window in enumerate(windows):
        content = positions_of(documents[window.document], window.start, window.stop + 1)
        bytes[row, : len(content)] = content
        mask[row, : window.stop - window.start] = True
    read = devices.rows((jnp.asarray(bytes), jnp.asarray(mask), keys))
    compute = functools.partial(byte_pass, model, *read)
    result = jax.tree.map(np.asarray, with_enough_capacity(bytes.shape[1], rate_of(model), compute))
    parts = []
    for row, window in enumerate(windows):
        part = slice(window.counted - window.start, window.stop - window.start)
        size = window.stop - window.counted
        early, predicts = result.early_log_prob, _predicts(documents[window.document], window)
        parts.append(
            PositionScores(
                result.likelihoods.log_prob[row, part] * predicts,
                np.full(size, np.nan, np.float32) if early is None else early[row, part] * predicts,
                result.prob[row, part],
                result.likelihoods.depth[row, part].astype(np.uint8),
                np.arange(window.counted, window.stop) == window.start,
                result.likelihoods.most_likely[row, part] | (predicts == 0),
                result.inner_prob[row, part],
            )
        )
    return parts


def _predicts(document: bytes, window: Window) -> Float32[np.ndarray, " positions"]:
    """1 at the counted positions that another one follows in the document, 0 at its last."""
    return (np.arange(window.counted, window.stop) < len(document)).astype(np.float32)


def positions_of(document: bytes, start: int, stop: int) -> UInt8[np.ndarray, " positions"]:
    """Some positions of a document: BOS is position 0. Fewer where the document ends before `stop`."""
    content = document[max(start - 1, 0) : stop - 1]
    return np.frombuffer(bytes([BOS]) + content if start == 0 else content, np.uint8)
