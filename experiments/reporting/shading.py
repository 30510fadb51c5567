"""Held-out text with a boundary probability for each character."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import matplotlib
import numpy as np

from data import BOS, Row
from experiments.evaluation.evaluate import evaluate_batch, stack_rows
from experiments.evaluation.segmentation import character_spans
from unet.language_model import AbstractLanguageModel


@dataclass(frozen=True)
class Character:
    """A character, the boundary probability at its last byte, and whether one of its bytes has a boundary."""

    text: str
    prob: float
    boundary: bool


def shade(model: AbstractLanguageModel, rows: Sequence[Row], *, seed: int) -> list[list[Character]]:
    """The characters of each row with boundary probabilities and sampled boundaries. Invalid bytes become U+FFFD."""
    result = evaluate_batch(model, stack_rows(rows, len(rows)), jax.random.key(seed), None)
    probs, sampled = np.asarray(result.probs), np.asarray(result.sampled)
    shaded = []
    for number, row in enumerate(rows):
        valid = int(row["mask"].sum())
        shaded.append(characters(row["bytes"][:valid], probs[number, :valid], sampled[number, :valid]))
    return shaded


def characters(values: np.ndarray, probs: np.ndarray, boundaries: np.ndarray) -> list[Character]:
    """The characters of a byte sequence, each with the probability at its last byte. BOS becomes a small square."""
    content, result = values.astype(np.uint8).tobytes(), []
    for first, stop in character_spans(content):
        text = "▪" if content[first] == BOS else content[first:stop].decode("utf-8", errors="replace")
        result.append(Character(text, float(probs[stop - 1]), bool(boundaries[first:stop].any())))
    return result


def colour_of(prob: float) -> tuple[int, int, int]:
    """Background colour for a probability: blue for 0, white in the middle, red for 1; pale enough for black text."""
    red, green, blue, _ = matplotlib.colormaps["coolwarm"](float(prob))
    # Mixing with white keeps black text legible.
    red, green, blue = (round(255 * (0.35 + 0.65 * channel)) for channel in (red, green, blue))
    return red, green, blue
