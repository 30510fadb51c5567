"""Boundaries of a trained model compared with token and word ends, and its likelihood with boundaries at other positions."""

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
from experiments.evaluation.segmentation import BYTE_POSITIONS, ByteLabels, BytePosition, Scores, expected_scores
from unet import UNet


@dataclass(frozen=True)
class BoundaryStatistics:
    """Statistics of one set of boundaries over the counted bytes.

    `rate`: fraction of bytes with a boundary. `places`: distribution of the boundaries over positions in characters. `ends`,
    `words`: scores against the ends of all tokens, and of words alone.
    """

    rate: float
    places: dict[BytePosition, float]
    ends: Scores
    words: Scores


@dataclass(frozen=True)
class WithBaselines:
    """Statistics of the model's boundaries (`own`) and the expected ones of as many uniform boundaries, drawn from all bytes
    (`uniform`) or from the last bytes of characters (`uniform_characters`)."""

    own: BoundaryStatistics
    uniform: BoundaryStatistics
    uniform_characters: BoundaryStatistics


@dataclass(frozen=True)
class PlacementResult:
    """Evaluation with boundaries at given positions.

    `bpb`: bits per byte. `bits`: mean bits of a predicted byte, by its position in its character. `rate`: fraction of bytes with
    a boundary. `there`: fraction of the free boundaries that are at the requested positions; the rest did not fit, since their
    row has too few such positions. NaN if no positions were requested.
    """

    bpb: float
    bits: dict[BytePosition, float]
    rate: float
    there: float


@dataclass(frozen=True)
class RunAnalysis:
    """Boundary analysis of one run.

    `bits`, `early_bits`: mean bits of a predicted byte, by its position in its character, with the token level and for the early
    head alone (NaN without one). Their difference is the reward for boundaries. `auc_ends`, `auc_words`: the probability that p
    is higher at the end of a token, or of a word, than at another byte.
    """

    bpb: float
    bits: dict[BytePosition, float]
    early_bits: dict[BytePosition, float]
    auc_ends: float
    auc_words: float
    sampled: WithBaselines
    greedy: WithBaselines
    placements: dict[str, PlacementResult] = field(default_factory=dict)


def analyse(results: dict[str, np.ndarray], labels: ByteLabels) -> RunAnalysis:
    """Compare the boundaries in the results of `evaluate_rows` with the labels of the same rows. Forced boundaries do not
    count."""
    bits = [bits_by_position(results[name], results["scored"], labels) for name in ("log_prob", "early_log_prob")]
    labels = labels.restricted_to(results["free"])
    counted = {**results, "free": labels.counted}
    ends, words = agreement(counted, labels.token_ends), agreement(counted, labels.word_ends)
    targets = (ends, words)
    sampled = [Scores(one.sampled_precision, one.sampled_recall, one.sampled_f1) for one in targets]
    greedy = [Scores(one.precision, one.recall, one.f1) for one in targets]
    return RunAnalysis(
        bpb=summarise(results).bpb,
        bits=bits[0],
        early_bits=bits[1],
        auc_ends=ends.auc,
        auc_words=words.auc,
        sampled=_with_baselines(results["sampled"], sampled, labels),
        greedy=_with_baselines(results["greedy"], greedy, labels),
    )


def bits_by_position(
    log_prob: np.ndarray, scored: Bool[np.ndarray, "rows length"], labels: ByteLabels
) -> dict[BytePosition, float]:
    """Mean bits of the predicted bytes at each position in their characters. `log_prob` at i is that of byte i + 1."""
    bits = {}
    for number, name in enumerate(BYTE_POSITIONS):
        chosen = scored[:, :-1] & (labels.positions[:, 1:] == number)
        nats = -float(log_prob[:, :-1][chosen].sum(dtype=np.float64))
        bits[name] = float(bits_per_byte(nats, int(chosen.sum()))) if chosen.any() else math.nan
    return bits


def _with_baselines(
    actions: Bool[np.ndarray, "rows length"], scores: Sequence[Scores], labels: ByteLabels
) -> WithBaselines:
    chosen = actions & labels.counted
    count, total = int(chosen.sum()), int(labels.counted.sum())
    ends, words = scores
    return WithBaselines(
        BoundaryStatistics(count / total if total else math.nan, position_fractions(labels, chosen), ends, words),
        uniform_baseline(count, labels, labels.counted),
        uniform_baseline(count, labels, labels.at("single", "last")),
    )


def uniform_baseline(count: int, labels: ByteLabels, candidates: Bool[np.ndarray, "rows length"]) -> BoundaryStatistics:
    """Expected statistics of `count` boundaries drawn uniformly, without replacement, from some of the counted bytes."""
    available, total = int(candidates.sum()), int(labels.counted.sum())
    ends, words = (
        expected_scores(count, available, int(target.sum())) for target in (labels.token_ends, labels.word_ends)
    )
    rate = min(count, available) / total if total else math.nan
    return BoundaryStatistics(rate, position_fractions(labels, candidates), ends, words)


def position_fractions(labels: ByteLabels, chosen: Bool[np.ndarray, "rows length"]) -> dict[BytePosition, float]:
    """Distribution of the chosen bytes over positions in characters; NaN if none is chosen."""
    total = int(chosen.sum())
    return {
        position: int((labels.at(position) & chosen).sum()) / total if total else math.nan
        for position in BYTE_POSITIONS
    }


def evaluate_placements(
    model: UNet, rows: Sequence[Row], results: dict[str, np.ndarray], labels: ByteLabels, *, batch: int, seed: int
) -> dict[str, PlacementResult]:
    """Bits per byte of a model with its own boundaries and with the same number of boundaries at other positions of each row.

    `results`: the output of `evaluate_rows`, which holds the model's own boundaries. Only the outermost level is changed.
    A model learns to use boundaries at the positions where it draws them. The results thus give the cost of moving its
    boundaries, not the quality of a model trained with others. A smoothing chunker weights each token by the router's p, which
    does not move with the boundaries. The end of a word reveals something about the next byte, which no causal rule can know.
    """
    starts = results["valid"] & ~results["free"]
    noise = np.random.default_rng(seed).random(starts.shape)
    counts = (results["sampled"] & results["free"]).sum(axis=1)
    no_preference = np.zeros_like(starts)
    requested = {
        "as it draws them": None,
        "where p > 0.5": None,
        "uniform": None,
        "first bytes of characters": labels.at("single", "first"),
        "middle bytes of characters": labels.at("middle"),
        "last bytes of characters": labels.at("single", "last"),
        "ends of tokens": labels.token_ends,
        "ends of words": labels.word_ends,
    }
    placements = {}
    for name, positions in requested.items():
        if name == "as it draws them":
            actions = results["sampled"]
        elif name == "where p > 0.5":
            actions = results["greedy"]
        else:
            preferred = no_preference if positions is None else positions
            actions = starts | draw_boundaries(counts, preferred, results["free"], noise)
        moved = evaluate_rows(
            model, rows, batch=batch, capacity=actions.shape[1], key=jax.random.key(seed), actions=actions
        )
        free = actions & results["free"]
        there = int((free & positions).sum()) / int(free.sum()) if positions is not None and free.any() else math.nan
        bits = bits_by_position(moved["log_prob"], moved["scored"], labels)
        rate = float(actions.sum() / results["valid"].sum())
        placements[name] = PlacementResult(summarise(moved).bpb, bits, rate, there)
    return placements


def draw_boundaries(
    counts: np.ndarray,
    preferred: Bool[np.ndarray, "rows length"],
    allowed: Bool[np.ndarray, "rows length"],
    noise: np.ndarray,
) -> Bool[np.ndarray, "rows length"]:
    """`counts` boundaries in each row, drawn uniformly from the preferred bytes that are allowed, then from the other allowed
    bytes once the preferred ones are used up. `noise`: uniform numbers in [0, 1), one for each byte."""
    order = np.argsort(np.where(allowed, noise + preferred, -1.0), axis=1)[:, ::-1]
    rank = np.argsort(order, axis=1)
    return (rank < counts[:, None]) & allowed
