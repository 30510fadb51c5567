"""Labels for token ends, word ends and characters of a text, and expected scores of uniform boundaries against them."""

from __future__ import annotations

import itertools
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int8

from data import Row
from experiments.config.errors import ConfigError
from unet import utf8

Segmenter = Callable[[str], Sequence[str]]
"""Splits a text into consecutive tokens, whose concatenation is the text."""

SegmenterName = Literal["jieba", "whitespace"]

BytePosition = Literal["single", "first", "middle", "last"]
BYTE_POSITIONS: tuple[BytePosition, ...] = ("single", "first", "middle", "last")
"""Positions of a byte in its UTF-8 character. `single`: the character has one byte. The others: characters of several bytes."""


def by_whitespace(text: str) -> list[str]:
    """Tokens that each end with one ASCII white-space character, or at the end of the text. Token ends are thus the white-space
    bytes."""
    return re.findall(r"[^\t-\r ]*[\t-\r ]|[^\t-\r ]+", text)


def by_jieba() -> Segmenter:
    """A segmenter of Chinese text: jieba in its exact mode, with its model of unknown words. Punctuation marks and white-space
    characters are separate tokens. Raises `ConfigError` if jieba is not installed."""
    try:
        # jieba triggers warnings about regular expressions and pkg_resources.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import jieba
    except ImportError as error:
        raise ConfigError(f"--segmenter jieba needs jieba ({error}): pip install 'caesura-lm[words]'") from None
    jieba.setLogLevel(logging.WARNING)
    tokenizer = jieba.Tokenizer()
    # The same as `initialize`, but without a cache file in the shared temporary folder.
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return lambda text: list(tokenizer.cut(text))


def open_segmenter(name: SegmenterName) -> Segmenter:
    """The segmenter called `name`. Raises `ConfigError` if it is not installed."""
    return by_jieba() if name == "jieba" else by_whitespace


@dataclass(frozen=True)
class ByteLabels:
    """Labels of each byte of some rows.

    `counted`: the byte belongs to a complete character that is not the last one of its text. The last one is excluded since a
    word may continue beyond the row, and since a boundary after the last byte of a text changes no prediction. `token_ends`: the
    counted bytes that end a token. `word_ends`: the counted bytes that end a token with a letter, a digit or a Chinese character,
    as opposed to punctuation or white space alone. `positions`: the index in `BYTE_POSITIONS` for every byte of a complete
    character, -1 elsewhere.
    """

    counted: Bool[np.ndarray, "rows length"]
    token_ends: Bool[np.ndarray, "rows length"]
    word_ends: Bool[np.ndarray, "rows length"]
    positions: Int8[np.ndarray, "rows length"]

    def restricted_to(self, mask: Bool[np.ndarray, "rows length"]) -> ByteLabels:
        """The same labels with only bytes in `mask` counted."""
        return ByteLabels(self.counted & mask, self.token_ends & mask, self.word_ends & mask, self.positions)

    def at(self, *positions: BytePosition) -> Bool[np.ndarray, "rows length"]:
        """The counted bytes at one of these positions in their characters."""
        return self.counted & np.isin(self.positions, [BYTE_POSITIONS.index(position) for position in positions])


def label_bytes(rows: Sequence[Row], segment: Segmenter) -> ByteLabels:
    """Segment the text of each document in each row. Raises `ValueError` if the tokens of a text do not make up the text."""
    shape = (len(rows), len(rows[0]["bytes"]))
    counted, token_ends, word_ends = (np.zeros(shape, bool) for _ in range(3))
    positions = np.full(shape, -1, np.int8)
    for number, row in enumerate(rows):
        for first, text in _texts(row):
            sizes = np.array([len(character.encode()) for character in text])
            ends = first + np.cumsum(sizes)
            counted[number, first : ends[-1] - sizes[-1]] = True
            positions[number, first : ends[-1]] = BYTE_POSITIONS.index("middle")
            positions[number, ends - 1] = BYTE_POSITIONS.index("last")
            positions[number, ends - sizes] = np.where(
                sizes == 1, BYTE_POSITIONS.index("single"), BYTE_POSITIONS.index("first")
            )
            tokens = segment(text)
            if "".join(tokens) != text:
                raise ValueError(f"the segmenter lost or changed something of {text[:40]!r}")
            last = ends[np.cumsum([len(token) for token in tokens]) - 1] - 1
            token_ends[number, last] = True
            word_ends[number, last] = [any(character.isalnum() for character in token) for token in tokens]
    return ByteLabels(counted, token_ends & counted, word_ends & counted, positions)


def _texts(row: Row) -> Iterator[tuple[int, str]]:
    """The maximal runs of complete characters of one document, each with its offset in the row."""
    valid = int(row["mask"].sum())
    values, segments = row["bytes"][:valid], row["segments"][:valid]
    borders = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), valid]
    for begin, end in itertools.pairwise(borders):
        content = values[begin:end].tobytes()
        # Bytes outside complete characters: BOS, and a character cut off at the start or end of the row.
        invalid = [
            start for start, stop in utf8.character_spans(content) if stop == start + 1 and content[start] >= 0x80
        ]
        for start, stop in zip([-1, *invalid], [*invalid, len(content)], strict=True):
            if start + 1 < stop:
                yield begin + start + 1, content[start + 1 : stop].decode()


@dataclass(frozen=True)
class Scores:
    """Precision, recall and F1 of boundaries as predictions of token or word ends. NaN where undefined."""

    precision: float
    recall: float
    f1: float


def expected_scores(count: int, candidates: int, targets: int) -> Scores:
    r"""Expected scores of `count` boundaries that are drawn uniformly, without replacement, from a number of `candidates` which
    include all `targets`.

    With k = `count`, m = `candidates` and w = `targets`, the expected number of true positives is $h = k w / m$ (the mean of the
    hypergeometric distribution). Precision $h/k$, recall $h/w$ and $F_1 = 2h/(k + w)$ are linear in the true positives, so these
    means are exact. If `count` exceeds `candidates`, all candidates are boundaries.
    """
    count = min(count, candidates)
    true_positives = count * targets / candidates if candidates else 0.0
    return Scores(
        true_positives / count if count else float("nan"),
        true_positives / targets if targets else float("nan"),
        2 * true_positives / (count + targets) if count + targets else float("nan"),
    )
