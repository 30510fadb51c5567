"""Measures of a model's predictions and boundaries, each a pure function of the scores of a text's bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from estimators import equations
from experiments.evaluation.byte_scores import ByteScores, Text
from experiments.evaluation.evaluate import area_under_roc
from experiments.evaluation.segmentation import expected_scores

LONGEST = 32
"""Longer chunks share the last bar of the histogram."""


def bits_of(nats: float, count: float | int) -> float:
    """Bits per byte; NaN for no byte."""
    return float(equations.bits_per_byte(nats, count)) if count else math.nan


@dataclass(frozen=True)
class Likelihood:
    """Bits per byte of a text.

    `bpb`: mean over the samples of boundaries. `bpb_error`: its standard error over documents, after the mean over samples.
    `early_bpb`: of the early head; NaN without one. `mixture_bpb`: from the logarithm of the mean probability of each document
    over the samples; at most `bpb`, and equal to it for one sample. `document_nats`: negative log-probability of each document,
    the mean over samples.
    """

    bpb: float
    bpb_error: float
    early_bpb: float
    mixture_bpb: float
    document_nats: Float[np.ndarray, " documents"]


def likelihood(scores: ByteScores, text: Text) -> Likelihood:
    """The bits per byte of all bytes of a text."""
    nats = -np.stack([text.totals(one) for one in scores.log_prob])
    early = -scores.early_log_prob.sum(dtype=np.float64) / len(scores.early_log_prob)
    mean = nats.mean(axis=0)
    largest = (-nats).max(axis=0)
    mixture = largest + np.log(np.exp(-nats - largest).mean(axis=0))
    sizes = jnp.asarray(text.sizes, jnp.float32)
    return Likelihood(
        bits_of(float(mean.sum()), text.bytes),
        float(equations.bits_per_byte_error(jnp.asarray(mean, jnp.float32), sizes)),
        bits_of(float(early), text.bytes),
        bits_of(-float(mixture.sum()), text.bytes),
        mean,
    )


def boundary_rate(scores: ByteScores) -> float:
    """The fraction of the bytes where none is forced that have a boundary; 0 without a token level."""
    free = int(scores.free.sum())
    return int((scores.boundaries & scores.free).sum()) / free if free else math.nan


def bytes_per_token(scores: ByteScores) -> tuple[float, ...]:
    """At each level, the outermost first, the bytes for each token that it closes; infinite where it closes none."""
    closed = [int((scores.depth > level).sum()) for level in range(scores.levels)]
    return tuple(scores.depth.size / count if count else math.inf for count in closed)


@dataclass(frozen=True)
class Fit:
    """Boundaries as predictions of certain bytes (the targets).

    `auc`: probability that the boundary probability is higher at a target than at another byte. `precision`, `recall`, `f1`: of
    the boundaries. `chance_f1`: the expected F1 of as many boundaries drawn uniformly. `targets`: fraction of the bytes that are
    targets. NaN where undefined.
    """

    auc: float
    precision: float
    recall: float
    f1: float
    chance_f1: float
    targets: float


def fit(scores: ByteScores, text: Text, targets: Bool[np.ndarray, " bytes"]) -> Fit:
    """How well the boundaries fit `targets`. Forced boundaries and the last bytes of documents, after which nothing is
    predicted, do not count."""
    counted = scores.free & ~text.ends
    wanted = np.broadcast_to(targets, counted.shape)[counted]
    drawn, prob = scores.boundaries[counted], scores.prob[counted]
    hits, count, positives = int((drawn & wanted).sum()), int(drawn.sum()), int(wanted.sum())
    return Fit(
        area_under_roc(prob, wanted),
        hits / count if count else math.nan,
        hits / positives if positives else math.nan,
        2 * hits / (count + positives) if count + positives else math.nan,
        expected_scores(count, wanted.size, positives).f1,
        positives / wanted.size if wanted.size else math.nan,
    )


@dataclass(frozen=True)
class Enrichment:
    """`ratio`: the boundary enrichment. `start_bits`, `other_bits`: mean bits of the bytes that begin a chunk, and of the
    others."""

    ratio: float
    start_bits: float
    other_bits: float


def boundary_enrichment(scores: ByteScores, text: Text) -> Enrichment:
    r"""Whether chunks begin where the next byte is surprising.

    $B = \frac{\frac1{|S|}\sum_{i\in S} s_i}{\frac1{|I|}\sum_{i\in I} s_i}$, where $s_i = -\log_2 p(x_i\mid x_{<i})$, I are all
    bytes but the first of each document and those after a forced boundary, and S those of I that begin a chunk: the byte before
    them has a boundary of the outermost level. 1: no relation, above 1: chunks begin at bytes that are hard to predict.

    Sombrero (arXiv 2601.22805) introduced a measure of this name for the same question. The formula is ours, and the surprisal
    is that of the same model, whose token level has seen the chunk that has just been closed. NaN without boundaries.
    """
    before = scores.boundaries[:, :-1] & scores.free[:, :-1]
    inside = np.broadcast_to(~text.ends[:-1], before.shape) & scores.free[:, :-1]
    bits = scores.log_prob[:, 1:].astype(np.float64) / -math.log(2.0)
    starts, others = bits[inside & before], bits[inside & ~before]
    everything = bits[inside]
    mean = float(everything.mean()) if everything.size else math.nan
    start = float(starts.mean()) if starts.size else math.nan
    return Enrichment(start / mean if mean else math.nan, start, float(others.mean()) if others.size else math.nan)


@dataclass(frozen=True)
class ChunkLengths:
    """Lengths in bytes of the chunks that end at a boundary of the outermost level. `variation`: standard deviation divided by
    mean. `histogram`: how many have 1, 2, … and `LONGEST` or more bytes."""

    mean: float
    deviation: float
    variation: float
    longest: int
    histogram: tuple[int, ...]


def chunk_lengths(scores: ByteScores, text: Text) -> ChunkLengths:
    """The lengths of all chunks. The first chunk of a document begins with its first byte; what follows its last boundary is no
    chunk."""
    lengths = np.concatenate([_lengths(one, text) for one in scores.boundaries])
    if not lengths.size:
        return ChunkLengths(math.nan, math.nan, math.nan, 0, (0,) * LONGEST)
    histogram = np.bincount(np.minimum(lengths, LONGEST), minlength=LONGEST + 1)[1:]
    mean, deviation = float(lengths.mean()), float(lengths.std())
    return ChunkLengths(mean, deviation, deviation / mean, int(lengths.max()), tuple(map(int, histogram)))


def _lengths(boundaries: Bool[np.ndarray, " bytes"], text: Text) -> Int[np.ndarray, " chunks"]:
    places = np.flatnonzero(boundaries)
    offsets, documents = text.offset[places], text.document[places]
    follows = np.zeros(len(places), bool)
    follows[1:] = documents[1:] == documents[:-1]
    # The length up to the first boundary of a document is counted from its start.
    return offsets - np.where(follows, np.roll(offsets, 1), -1)


@dataclass(frozen=True)
class ClassStatistics:
    """One class of bytes. `share`: fraction of all bytes. `rate`: fraction of the class with a boundary after it. `boundaries`:
    fraction of all boundaries. `bpb`: mean bits of a byte of the class. `bits`: fraction of all bits."""

    share: float
    rate: float
    boundaries: float
    bpb: float
    bits: float


def class_statistics(
    scores: ByteScores, classes: Int[np.ndarray, " bytes"], names: Sequence[str]
) -> dict[str, ClassStatistics]:
    """The statistics of each class of bytes that occurs. `classes`: for each byte the index of its class in `names`. Forced
    boundaries do not count."""
    count = scores.log_prob.shape[1]
    nats = -scores.log_prob.mean(axis=0, dtype=np.float64)
    drawn = (scores.boundaries & scores.free).sum(axis=0)
    free = scores.free.sum(axis=0)

    def sums(values: np.ndarray) -> np.ndarray:
        return np.bincount(classes, weights=values, minlength=len(names))

    sizes, of_nats, of_drawn, of_free = sums(np.ones(count)), sums(nats), sums(drawn), sums(free)
    total_drawn, total_nats = of_drawn.sum(), of_nats.sum()
    return {
        name: ClassStatistics(
            float(sizes[number] / count),
            float(of_drawn[number] / of_free[number]) if of_free[number] else math.nan,
            float(of_drawn[number] / total_drawn) if total_drawn else math.nan,
            bits_of(float(of_nats[number]), float(sizes[number])),
            float(of_nats[number] / total_nats) if total_nats else math.nan,
        )
        for number, name in enumerate(names)
        if sizes[number]
    }


@dataclass(frozen=True)
class Change:
    """What differs between the boundaries of two models. `changed`: fraction of the boundaries of either that the other has not.
    `bytes`: fraction of the bytes where one has a boundary and the other has none."""

    changed: float
    bytes: float


def boundary_change(first: ByteScores, second: ByteScores) -> Change:
    r"""The change from one set of boundaries to another: $1 - |A\cap B| / |A\cup B|$ and $|A\triangle B| / n$. Forced boundaries
    do not count; NaN where neither has any."""
    free = first.free & second.free
    a, b = first.boundaries & free, second.boundaries & free
    either, differing = int((a | b).sum()), int((a ^ b).sum())
    total = int(free.sum())
    return Change(differing / either if either else math.nan, differing / total if total else math.nan)
