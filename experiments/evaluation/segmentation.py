"""Where the words and the characters of a text end, and how well uniform boundaries agree with that."""

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
"""Cuts a text into tokens, one after another, that make up the text again."""

SegmenterName = Literal["jieba", "whitespace"]

Place = Literal["single", "first", "middle", "last"]
PLACES: tuple[Place, ...] = ("single", "first", "middle", "last")
"""Where a byte stands in its UTF-8 character: it is the whole of it, opens it, or stands further in."""


def by_whitespace(text: str) -> list[str]:
    """Tokens that each end with one ASCII white-space character, so that a boundary agrees where it stands at white space."""
    return re.findall(r"[^\t-\r ]*[\t-\r ]|[^\t-\r ]+", text)


def by_jieba() -> Segmenter:
    """Chinese words as jieba sees them, in its exact mode with its model of unknown words; punctuation marks and white-space
    characters are tokens of their own. Raises `ConfigError` where jieba is not installed."""
    try:
        # It is older than some warnings about regular expressions and about pkg_resources.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import jieba
    except ImportError as error:
        raise ConfigError(f"--segmenter jieba needs jieba ({error}): pip install 'caesura-lm[words]'") from None
    jieba.setLogLevel(logging.WARNING)
    tokenizer = jieba.Tokenizer()
    # What `initialize` does, without a file in the folder for temporary ones that all users share.
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return lambda text: list(tokenizer.cut(text))


def open_segmenter(name: SegmenterName) -> Segmenter:
    """The segmenter of that name. Raises `ConfigError` where it is not installed."""
    return by_jieba() if name == "jieba" else by_whitespace


def character_spans(content: bytes) -> Iterator[tuple[int, int]]:
    """Where each character begins and ends; a byte that is part of none is one by itself."""
    start = 0
    while start < len(content):
        end, state = start + 1, int(utf8.AFTER[utf8.COMPLETE, content[start]])
        while state > 0 and end < len(content) and (after := int(utf8.AFTER[state, content[end]])) >= 0:
            end, state = end + 1, after
        # What was begun and not completed is no character: its first byte stands alone.
        end = end if state == utf8.COMPLETE else start + 1
        yield start, end
        start = end


@dataclass(frozen=True)
class Marks:
    """What is known of each byte of some rows.

    `counted`: it belongs to a whole character that is not the last of its text: where a row ends, a word need not, and a
    boundary behind the last byte of a text changes no prediction. Of these, `ends`: the last byte of a token; `words`: of a
    token with a letter, a digit or a Chinese character in it, neither punctuation nor white space alone. `places`: the number in
    `PLACES` of every byte of a whole character, -1 elsewhere.
    """

    counted: Bool[np.ndarray, "rows length"]
    ends: Bool[np.ndarray, "rows length"]
    words: Bool[np.ndarray, "rows length"]
    places: Int8[np.ndarray, "rows length"]

    def where(self, rows: Bool[np.ndarray, "rows length"]) -> Marks:
        """The same with nothing counted elsewhere than at these bytes."""
        return Marks(self.counted & rows, self.ends & rows, self.words & rows, self.places)

    def at(self, *places: Place) -> Bool[np.ndarray, "rows length"]:
        """The counted bytes that stand there in their characters."""
        return self.counted & np.isin(self.places, [PLACES.index(place) for place in places])


def mark(rows: Sequence[Row], segment: Segmenter) -> Marks:
    """Segment the text of each document in each row. Raises `ValueError` for a segmenter whose tokens do not make up its text."""
    shape = (len(rows), len(rows[0]["bytes"]))
    counted, ends, words = (np.zeros(shape, bool) for _ in range(3))
    places = np.full(shape, -1, np.int8)
    for number, row in enumerate(rows):
        for first, text in _texts(row):
            sizes = np.array([len(character.encode()) for character in text])
            after = first + np.cumsum(sizes)
            counted[number, first : after[-1] - sizes[-1]] = True
            places[number, first : after[-1]] = PLACES.index("middle")
            places[number, after - 1] = PLACES.index("last")
            places[number, after - sizes] = np.where(sizes == 1, PLACES.index("single"), PLACES.index("first"))
            tokens = segment(text)
            if "".join(tokens) != text:
                raise ValueError(f"the segmenter lost or changed something of {text[:40]!r}")
            last = after[np.cumsum([len(token) for token in tokens]) - 1] - 1
            ends[number, last] = True
            words[number, last] = [any(character.isalnum() for character in token) for token in tokens]
    return Marks(counted, ends & counted, words & counted, places)


def _texts(row: Row) -> Iterator[tuple[int, str]]:
    """The longest stretches of whole characters of one document, each with its place in the row."""
    valid = int(row["mask"].sum())
    values, segments = row["bytes"][:valid], row["segments"][:valid]
    cuts = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), valid]
    for begin, end in itertools.pairwise(cuts):
        content = values[begin:end].tobytes()
        # Bytes that are part of no character stand alone: BOS, a character that the row's edge has cut.
        broken = [start for start, stop in character_spans(content) if stop == start + 1 and content[start] >= 0x80]
        for start, stop in zip([-1, *broken], [*broken, len(content)], strict=True):
            if start + 1 < stop:
                yield begin + start + 1, content[start + 1 : stop].decode()


@dataclass(frozen=True)
class Scores:
    """How boundaries agree with the ends of words. NaN where undefined."""

    precision: float
    recall: float
    f1: float


def expected_scores(count: int, among: int, wanted: int) -> Scores:
    r"""What `count` boundaries reach in expectation that are drawn uniformly, without replacement, `among` so many bytes, all the
    `wanted` ones among them.

    They hit $h = k w / m$ of them (the mean of the hypergeometric distribution), and precision $h/k$, recall $h/w$ and
    $F_1 = 2h/(k + w)$ are linear in the hits: these are the exact means. More boundaries than places: one at every place.
    """
    count = min(count, among)
    hits = count * wanted / among if among else 0.0
    return Scores(
        hits / count if count else float("nan"),
        hits / wanted if wanted else float("nan"),
        2 * hits / (count + wanted) if count + wanted else float("nan"),
    )
