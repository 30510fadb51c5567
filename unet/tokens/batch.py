"""Rows of bytes as rows of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer, Shaped

from unet.ops.rows import add_at
from unet.tokens.tokenizer import Tokenizer

SHORTEST = 16
"""Rows of tokens are no shorter."""


class TokenBatch(eqx.Module):
    """Rows of tokens: their numbers (`ids`), the place of the last byte of each in its row of bytes (`ends`), the number of its
    document, and where there is padding.

    The first byte of every document of a row is a token by itself. So the tokens after it cover exactly the bytes that a model of
    bytes predicts there, given the same bytes.
    """

    ids: Int[Array | np.ndarray, "batch tokens"]
    ends: Int[Array | np.ndarray, "batch tokens"]
    segments: Int[Array | np.ndarray, "batch tokens"]
    mask: Bool[Array | np.ndarray, "batch tokens"]


def tokenised(
    tokenizer: Tokenizer,
    bytes: Integer[np.ndarray, "batch length"],
    segments: Int[np.ndarray, "batch length"],
    mask: Bool[np.ndarray, "batch length"],
    *,
    shortest: int = 0,
) -> TokenBatch:
    """The tokens of rows of bytes, padded to one of a few lengths, to `shortest` at least. Raises `ValueError` as
    `Tokenizer.encode_all` does."""
    spans = [
        (row, first, last)
        for row in range(len(bytes))
        for first, last in _documents(np.asarray(segments)[row], np.asarray(mask)[row])
    ]
    values = np.asarray(bytes).astype(np.uint8)
    # The first byte of a document alone, then the rest of it.
    parts = [
        values[row, start:stop].tobytes()
        for row, first, last in spans
        for start, stop in ((first, first + 1), (first + 1, last))
    ]
    encoded, sizes = tokenizer.encode_all(parts), tokenizer.token_sizes
    rows: list[list[tuple[np.ndarray, np.ndarray, int]]] = [[] for _ in values]
    for number, (row, first, _) in enumerate(spans):
        ids = np.concatenate(encoded[2 * number : 2 * number + 2])
        rows[row].append((ids, first + np.cumsum(sizes[ids]) - 1, int(segments[row][first])))
    most = max(sum(len(ids) for ids, _, _ in row) for row in rows)
    count = padded_length(max(most, shortest), max(values.shape[1], most))
    made = TokenBatch(*(np.zeros((len(rows), count), kind) for kind in (np.int32, np.int32, np.int32, np.bool_)))
    for number, row in enumerate(rows):
        place = 0
        for ids, ends, segment in row:
            part = slice(place, place + len(ids))
            made.ids[number, part], made.ends[number, part] = ids, ends
            made.segments[number, part], made.mask[number, part] = segment, True
            place += len(ids)
    return made


def _documents(segments: Int[np.ndarray, " length"], mask: Bool[np.ndarray, " length"]) -> Iterator[tuple[int, int]]:
    """Where each document of a row begins and ends, without padding."""
    size = int(mask.sum())
    changes = np.flatnonzero(np.diff(segments[:size])) + 1
    bounds = [0, *changes.tolist(), size]
    yield from ((first, last) for first, last in itertools.pairwise(bounds) if last > first)


def padded_length(count: int, most: int) -> int:
    """The length that rows of up to `count` positions are padded to: a power of two or one and a half of one, or `most` where
    that is less. So few programs are compiled."""
    length = SHORTEST
    while length < count:
        length = length * 3 // 2 if length & (length - 1) == 0 else length * 4 // 3
    return max(min(length, most), count)


def at_predictions(
    tokens: TokenBatch, values: Shaped[Array, "batch tokens"], length: int
) -> Shaped[Array, "batch length"]:
    """Values of the predictions made at tokens as values of those made at bytes: that of the next token stands where its last
    byte is predicted, one byte before it. The others are 0."""
    ends = jnp.roll(jnp.asarray(tokens.ends), -1, axis=1)
    same = jnp.roll(jnp.asarray(tokens.segments), -1, axis=1) == jnp.asarray(tokens.segments)
    is_next = jnp.roll(jnp.asarray(tokens.mask), -1, axis=1) & same & (jnp.arange(ends.shape[1]) < ends.shape[1] - 1)
    return add_at(jnp.where(is_next, ends - 1, length), jnp.where(is_next, values, jnp.zeros((), values.dtype)), length)


def at_last_byte(
    tokens: TokenBatch, values: Shaped[Array, "batch tokens"], length: int
) -> Shaped[Array, "batch length"]:
    """Values of tokens as values of bytes: each at the last byte of its token. The others are 0."""
    return add_at(jnp.where(jnp.asarray(tokens.mask), jnp.asarray(tokens.ends), length), values, length)
