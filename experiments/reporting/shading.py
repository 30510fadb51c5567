"""Held-out text with a boundary probability for each character."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np

from data import Row
from experiments.evaluation.byte_results import AbstractPass
from experiments.evaluation.evaluate import stack_rows
from unet.shading.characters import Character, characters

SEARCHED = 64
"""Characters among which the beginning of a document or of a word is looked for."""


def shade(passes: AbstractPass, rows: Sequence[Row], *, seed: int) -> list[list[Character]]:
    """The characters of each row with boundary probabilities and sampled boundaries of a model, of which `passes` are. Invalid
    bytes become U+FFFD."""
    result = passes.results(stack_rows(rows, len(rows)), jax.random.key(seed), None)
    probs, sampled = np.asarray(result.probs), np.asarray(result.sampled)
    # The prediction at a position is of the next byte; nothing predicts a first one.
    predicted = np.where(np.asarray(result.scored), -np.asarray(result.log_prob) / math.log(2.0), 0.0)
    bits = np.concatenate([np.zeros_like(predicted[:, :1]), predicted[:, :-1]], axis=1)
    shaded = []
    for number, row in enumerate(rows):
        valid = slice(int(row["mask"].sum()))
        shaded.append(
            characters(row["bytes"][valid], probs[number, valid], sampled[number, valid], bits[number, valid])
        )
    return shaded


def readable(text: Sequence[Character], most: int | None = None) -> list[Character]:
    """A part of a text, of up to `most` characters, that begins where a document or a word does, and, where it is cut, ends with
    a word. Text without white space begins with a character."""
    start = _beginning(text)
    part = list(text[start : None if most is None else start + most])
    if start + len(part) < len(text):
        spaces = [place for place, one in enumerate(part) if one.text.isspace()]
        part = part[: spaces[-1] + 1] if spaces else part
    return part


def _beginning(text: Sequence[Character]) -> int:
    near = [one.text for one in text[:SEARCHED]]
    if "▪" in near:
        return near.index("▪")
    for place, (one, following) in enumerate(itertools.pairwise(near)):
        if one.isspace() and not following.isspace():
            return place + 1
    return next((place for place, one in enumerate(near) if one != "\N{REPLACEMENT CHARACTER}"), 0)
