"""The boundaries of a trained model against the ends of words, and its predictions with boundaries elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Bool

from data import Row
from estimators.equations import bits_per_byte
from experiments.evaluation.evaluate import agreement, evaluate_rows, summarise
from experiments.evaluation.segmentation import PLACES, Marks, Place, Scores, expected_scores
from unet import UNet


@dataclass(frozen=True)
class Report:
    """Boundaries of one kind. `rate`: their share of the counted bytes; `places`: where in their characters they stand, by
    shares; `ends`, `words`: how they agree with the ends of all tokens, and of words alone."""

    rate: float
    places: dict[Place, float]
    ends: Scores
    words: Scores


@dataclass(frozen=True)
class Drawn:
    """The boundaries of a model, and what as many uniform ones are in expectation, over all bytes (`uniform`) and over the last
    bytes of characters (`uniform_characters`)."""

    own: Report
    uniform: Report
    uniform_characters: Report


@dataclass(frozen=True)
class Placement:
    """Bits per byte with boundaries placed somewhere, and the `bits` of a predicted byte by its place in its character; the
    `rate` of the boundaries, and the share of them that stand where they were asked for (`there`, NaN where nothing was asked
    for): the others found no such place left in their row."""

    bpb: float
    bits: dict[Place, float]
    rate: float
    there: float


@dataclass(frozen=True)
class Examined:
    """One run. `bits`, `early_bits`: bits of a predicted byte by its place in its character, with the token level and from the
    early head alone (NaN without one): their difference is what boundaries are rewarded for. `auc_ends`, `auc_words`: the
    probability that p is higher at the end of a token, or of a word, than elsewhere."""

    bpb: float
    bits: dict[Place, float]
    early_bits: dict[Place, float]
    auc_ends: float
    auc_words: float
    sampled: Drawn
    greedy: Drawn
    placements: dict[str, Placement] = field(default_factory=dict)


def examine(kept: dict[str, np.ndarray], marks: Marks) -> Examined:
    """The boundaries that `evaluate_rows` drew against the marks of the same rows. Where one is forced, it does not count."""
    bits = [bits_by_place(kept[name], kept["scored"], marks) for name in ("log_prob", "early_log_prob")]
    marks = marks.where(kept["free"])
    counted = {**kept, "free": marks.counted}
    ends, words = agreement(counted, marks.ends), agreement(counted, marks.words)
    targets = (ends, words)
    sampled = [Scores(one.sampled_precision, one.sampled_recall, one.sampled_f1) for one in targets]
    greedy = [Scores(one.precision, one.recall, one.f1) for one in targets]
    return Examined(
        bpb=summarise(kept).bpb,
        bits=bits[0],
        early_bits=bits[1],
        auc_ends=ends.auc,
        auc_words=words.auc,
        sampled=_against_uniform(kept["sampled"], sampled, marks),
        greedy=_against_uniform(kept["greedy"], greedy, marks),
    )


def bits_by_place(log_prob: np.ndarray, scored: Bool[np.ndarray, "rows length"], marks: Marks) -> dict[Place, float]:
    """Mean bits of the predicted bytes that stand at each place in their characters; `log_prob` of row i is that of byte i +
    1."""
    found = {}
    for number, name in enumerate(PLACES):
        chosen = scored[:, :-1] & (marks.places[:, 1:] == number)
        nats = -float(log_prob[:, :-1][chosen].sum(dtype=np.float64))
        found[name] = float(bits_per_byte(nats, int(chosen.sum()))) if chosen.any() else math.nan
    return found


def _against_uniform(actions: Bool[np.ndarray, "rows length"], scores: Sequence[Scores], marks: Marks) -> Drawn:
    chosen = actions & marks.counted
    count, total = int(chosen.sum()), int(marks.counted.sum())
    ends, words = scores
    return Drawn(
        Report(count / total if total else math.nan, shares(marks, chosen), ends, words),
        uniform(count, marks, marks.counted),
        uniform(count, marks, marks.at("single", "last")),
    )


def uniform(count: int, marks: Marks, among: Bool[np.ndarray, "rows length"]) -> Report:
    """What `count` uniform boundaries `among` some of the counted bytes are in expectation."""
    room, total = int(among.sum()), int(marks.counted.sum())
    ends, words = (expected_scores(count, room, int(target.sum())) for target in (marks.ends, marks.words))
    return Report(min(count, room) / total if total else math.nan, shares(marks, among), ends, words)


def shares(marks: Marks, chosen: Bool[np.ndarray, "rows length"]) -> dict[Place, float]:
    """How the chosen bytes divide among the places in characters; NaN for none."""
    total = int(chosen.sum())
    return {place: int((marks.at(place) & chosen).sum()) / total if total else math.nan for place in PLACES}


def placements(
    model: UNet, rows: Sequence[Row], kept: dict[str, np.ndarray], marks: Marks, *, batch: int, seed: int
) -> dict[str, Placement]:
    """Bits per byte of a model with its own boundaries (`kept`, of `evaluate_rows`) and with as many in other places of each row,
    at one level.

    A model learns to use boundaries where it draws them, so that this says what moving them costs *it*, not what a model
    trained with others would reach. A chunker that smooths weighs each token by the router's p, which has not moved. The end of
    a word tells something of the next byte, which no rule that reads from left to right can know: no model can be that good.
    """
    starts = kept["valid"] & ~kept["free"]
    noise = np.random.default_rng(seed).random(starts.shape)
    counts = (kept["sampled"] & kept["free"]).sum(axis=1)
    nowhere = np.zeros_like(starts)
    asked = {
        "as it draws them": None,
        "where p > 0.5": None,
        "uniform": None,
        "first bytes of characters": marks.at("single", "first"),
        "middle bytes of characters": marks.at("middle"),
        "last bytes of characters": marks.at("single", "last"),
        "ends of tokens": marks.ends,
        "ends of words": marks.words,
    }
    found = {}
    for name, places in asked.items():
        if name == "as it draws them":
            actions = kept["sampled"]
        elif name == "where p > 0.5":
            actions = kept["greedy"]
        else:
            actions = starts | place(counts, nowhere if places is None else places, kept["free"], noise)
        result = evaluate_rows(
            model, rows, batch=batch, capacity=actions.shape[1], key=jax.random.key(seed), actions=actions
        )
        free = actions & kept["free"]
        there = int((free & places).sum()) / int(free.sum()) if places is not None and free.any() else math.nan
        bits = bits_by_place(result["log_prob"], result["scored"], marks)
        found[name] = Placement(summarise(result).bpb, bits, float(actions.sum() / kept["valid"].sum()), there)
    return found


def place(
    counts: np.ndarray,
    preferred: Bool[np.ndarray, "rows length"],
    allowed: Bool[np.ndarray, "rows length"],
    noise: np.ndarray,
) -> Bool[np.ndarray, "rows length"]:
    """So many boundaries in each row, drawn uniformly from the preferred bytes, and from the others allowed once those are used
    up. `noise`: a uniform number for each byte."""
    order = np.argsort(np.where(allowed, noise + preferred, -1.0), axis=1)[:, ::-1]
    rank = np.argsort(order, axis=1)
    return (rank < counts[:, None]) & allowed
