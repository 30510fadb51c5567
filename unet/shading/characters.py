"""The characters of a text, with what a model makes of their bytes."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np

from estimators.base import BOS
from unet.decoding import utf8

MARKS = ("·", "│", "┃")
"""Shown after a byte that ends a token, by boundary depth: at one level, at two levels, at three or more."""

MOST_BITS = 8.0
"""From here on all losses have one colour: what a byte costs that is drawn blindly."""

_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
# The last two may not stand in XML.
_UNSEEN = (*range(0x80, 0xA0), 0x2028, 0x2029, *_DIRECTIONS, *range(0xD800, 0xE000), 0xFFFE, 0xFFFF)
_VISIBLE = _PICTURES | dict.fromkeys(_UNSEEN, 0xFFFD)
_JOINER = "\N{ZERO WIDTH JOINER}"


def visible(text: str) -> str:
    """Text of a model or of a data set for a screen: each control character but line ends and tabs as its picture (␛), and what
    else might be acted on, such as a change of direction, as U+FFFD."""
    return text.translate(_VISIBLE)


@dataclass(frozen=True)
class Character:
    """A character of a text.

    `prob`: probability of a boundary of the outermost level at its last byte; NaN without a token level. `depth`: how many
    levels, counted from the outermost, closed a token at one of its bytes. `bits`: bits of all its bytes; NaN if unknown.
    `token`: number of the outermost token that its last byte is in; None if unknown. `token_bytes`: the length of that token.
    """

    text: str
    prob: float
    depth: int
    bits: float = math.nan
    token: int | None = None
    token_bytes: int = 0

    @property
    def mark(self) -> str:
        """What stands after the character where it ends a token."""
        return MARKS[min(self.depth, len(MARKS)) - 1] if self.depth else ""


def characters(
    values: np.ndarray, probs: np.ndarray, depth: np.ndarray, bits: np.ndarray | None = None
) -> list[Character]:
    """The characters of a byte sequence. Invalid bytes become U+FFFD, BOS a small square.

    `probs`, `depth`, `bits`: of each byte, as in `Character`; where `bits` are given, tokens are counted too.
    """
    content, result = values.astype(np.uint8).tobytes(), []
    tokens = token_numbers(depth > 0)
    sizes = np.bincount(tokens) if tokens.size else tokens
    for first, stop in utf8.character_spans(content):
        text = "▪" if content[first] == BOS else content[first:stop].decode("utf-8", errors="replace")
        place = float(probs[stop - 1]), int(depth[first:stop].max())
        if bits is None:
            result.append(Character(text, *place))
            continue
        token = int(tokens[stop - 1])
        result.append(Character(text, *place, float(bits[first:stop].sum()), token, int(sizes[token])))
    return result


def token_numbers(closed: np.ndarray) -> np.ndarray:
    """The number of the token that each byte is in, from 0; `closed`: whether a token ends at the byte."""
    return np.cumsum(closed) - closed


def clusters(shown: Iterable[Character]) -> Iterator[Character]:
    """What is drawn as one sign, such as a letter with its accents or an emoji of several characters, as one character: with the
    probability of its last one, the most levels that closed a token in it, and all its bits."""
    held: Character | None = None
    for one in shown:
        if held is not None and _joins(held.text, one.text):
            depth, bits = max(held.depth, one.depth), held.bits + one.bits
            held = Character(held.text + one.text, one.prob, depth, bits, one.token, one.token_bytes)
            continue
        if held is not None:
            yield held
        held = one
    if held is not None:
        yield held


def _joins(before: str, character: str) -> bool:
    if before == "\n":
        return False
    if before.endswith(_JOINER):
        return True
    if _is_flag(character):
        # Two regional indicators are a flag, a third begins another one.
        return len(before) == 1 and _is_flag(before)
    return unicodedata.category(character[0]) in ("Mn", "Me", "Mc") or character == _JOINER or _is_tone(character)


def from_right(text: str) -> bool | None:
    """Whether a sign is of a script that is written from right to left; None of what is in both, such as digits and spaces."""
    kind = unicodedata.bidirectional(text[0])
    return kind in ("R", "AL") if kind in ("L", "R", "AL") else None


def _is_flag(text: str) -> bool:
    return "\N{REGIONAL INDICATOR SYMBOL LETTER A}" <= text[0] <= "\N{REGIONAL INDICATOR SYMBOL LETTER Z}"


def _is_tone(text: str) -> bool:
    return "\N{EMOJI MODIFIER FITZPATRICK TYPE-1-2}" <= text[0] <= "\N{EMOJI MODIFIER FITZPATRICK TYPE-6}"


Colour = tuple[int, int, int]

_NIGHT = (22, 24, 28)
"""The background of text on dark pages."""


def colour_of(prob: float, *, dark: bool = False) -> Colour:
    """Background colour for a probability: blue for 0, white in the middle, red for 1; pale enough for black text. `dark`: black
    in the middle, and dim enough for white text."""
    if dark:
        return _NIGHT if math.isnan(prob) else _mixed(_map_colour("berlin", prob), _NIGHT, 0.5)
    return _pale("coolwarm", prob)


def colour_of_bits(bits: float, *, dark: bool = False) -> Colour:
    """Background colour for what a character costs: white (`dark`: black) for 0, orange from `MOST_BITS` on."""
    share = bits if math.isnan(bits) else min(bits / MOST_BITS, 1.0)
    if dark:
        return _NIGHT if math.isnan(bits) else _mixed((160, 70, 8), _NIGHT, share)
    return _pale("Oranges", share)


def _pale(colours: str, value: float) -> Colour:
    # Mixing with white keeps black text legible.
    white = (255, 255, 255)
    return white if math.isnan(value) else _mixed(_map_colour(colours, value), white, 0.65)


def _map_colour(colours: str, value: float) -> tuple[float, float, float]:
    red, green, blue, _ = matplotlib.colormaps[colours](float(value))
    return 255 * red, 255 * green, 255 * blue


def _mixed(one: Sequence[float | int], other: Sequence[float | int], share: float) -> Colour:
    """So much of one colour, and the rest of another."""
    red, green, blue = (round(share * a + (1 - share) * b) for a, b in zip(one, other, strict=True))
    return red, green, blue
