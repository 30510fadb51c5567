"""Validation: likelihood of held-out text, and precision and recall of boundaries at white space."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PRNGKeyArray

from data import HeldOutRow, Row
from estimators import Layout, equations
from estimators.bounds import Sequences, require_within
from estimators.routers.rules import is_spacelike, is_whitespace
from experiments.evaluation.byte_results import AbstractPass, Actions, LocalPass
from unet.language_model import AbstractLanguageModel
from unet.likelihood import plain_layout

PROBABILITY_BINS = 10
"""Into how many equal parts validations divide boundary probabilities."""

AnyRow = TypeVar("AnyRow", bound=Row)


@dataclass(frozen=True)
class Agreement:
    """Boundaries as a classifier of a class of bytes: the area under the ROC curve of p, and precision, recall and F1 of greedy
    (p > 0.5) and of sampled boundaries. Forced boundaries do not count. NaN where undefined."""

    auc: float
    precision: float
    recall: float
    f1: float
    sampled_precision: float
    sampled_recall: float
    sampled_f1: float


@dataclass(frozen=True)
class Validation:
    """Results on held-out text.

    `bpb`: bits per byte. `early_bpb`: bits per byte of the early head; NaN without one. `rate`: fraction of bytes with a
    boundary. `policy_entropy`: nats per decision. `overflow`: fraction of bytes whose boundary was dropped; 0 by construction.
    `bytes`: number of predicted bytes. `inner_rates`: for each inner level, its number of tokens divided by that of the next
    outer level. `free_rate`: fraction with a boundary of the bytes where no constraint forces or forbids one, which is what a
    target rate asks for; NaN without constraints. `bpb_error`: standard error of `bpb` over documents; NaN for one document.
    `documents`: number of distinct documents.

    All results but `bpb_greedy` and `bpb_as_trained` use the boundaries that generation draws. Most estimators train on the same
    kind of boundaries: sampled ones (`sfe…`, `gumbel`, `uniform`), greedy ones (`hnet`), or those of a deterministic rule
    (`entropy`, `bpe`, `stride`, `characters` and others). An off-policy router (`AbstractOffPolicyRouter`) trains on boundaries
    of another router: the guide of `bpe-distilled`, or the behaviour policy of `sfe-offpolicy`. If the first level has one, the
    model is evaluated on three kinds of boundaries at that level: `bpb` with the router's own, sampled; `bpb_greedy` with its
    own, greedy; `bpb_as_trained` with those of the other router. The last two are NaN for other routers.
    """

    bpb: float
    early_bpb: float
    rate: float
    policy_entropy: float
    overflow: float
    bytes: int
    whitespace: Agreement
    spacelike: Agreement
    inner_rates: tuple[float, ...] = ()
    bpb_greedy: float = math.nan
    bpb_as_trained: float = math.nan
    bpb_error: float = math.nan
    documents: int = 0
    free_rate: float = math.nan
    probability: Mapping[str, float] = field(default_factory=dict)
    """Shares of the bytes with a boundary probability within each tenth, by its number; empty where no boundary was drawn."""


def stack_rows(rows: Sequence[Row], batch: int) -> Layout:
    """The layout of a batch of size `batch`. If there are fewer `rows`, the remaining ones are all padding."""
    missing = batch - len(rows)

    def stack(name: Literal["bytes", "segments", "mask"]) -> Array:
        return jnp.asarray(np.pad(np.stack([row[name] for row in rows]), ((0, missing), (0, 0))))

    return plain_layout(stack("bytes"), stack("segments"), stack("mask"))


def evaluate(
    passes: AbstractPass, rows: Sequence[HeldOutRow], *, batch: int, capacity: int, key: PRNGKeyArray
) -> Validation:
    """Evaluate the model of `passes` on all `rows` in batches of size `batch` without dropping boundaries. An off-policy router
    is evaluated with three kinds of boundaries (see `Validation`)."""
    accumulator = ValidationAccumulator()
    for part, results in evaluate_batches(passes, rows, batch=batch, capacity=capacity, key=key):
        accumulator.add({**results, "documents": np.stack([row["documents"] for row in part])})
    return accumulator.validation()


def evaluate_rows(
    model: AbstractLanguageModel,
    rows: Sequence[Row],
    *,
    batch: int,
    capacity: int,
    key: PRNGKeyArray,
    actions: Bool[np.ndarray, "rows length"] | None = None,
) -> dict[str, np.ndarray]:
    """The results of `evaluate_batches`, concatenated over all `rows`. They take about 30 bytes of memory per byte of text."""
    results: dict[str, list[np.ndarray]] = {}
    for _, arrays in evaluate_batches(LocalPass(model), rows, batch=batch, capacity=capacity, key=key, actions=actions):
        for name, array in arrays.items():
            results.setdefault(name, []).append(array)
    return {name: np.concatenate(parts) for name, parts in results.items()}


def evaluate_batches(
    passes: AbstractPass,
    rows: Sequence[AnyRow],
    *,
    batch: int,
    capacity: int,
    key: PRNGKeyArray,
    actions: Bool[np.ndarray, "rows length"] | None = None,
) -> Iterator[tuple[Sequence[AnyRow], dict[str, np.ndarray]]]:
    """Per-byte results for each batch of `rows`: the fields of `ByteResults` but `decided`, and the `bytes`. An off-policy router
    adds `log_prob_greedy` and `log_prob_as_trained`.

    `actions`: boundaries to use instead of sampled ones. The additional passes of an off-policy router are then skipped.
    """
    require_within("batch", batch, Sequences)
    batch = min(batch, len(rows))
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        layout = stack_rows(part, batch)
        key_batch = jax.random.fold_in(key, start)
        given = ()
        if actions is not None:
            given = (jnp.asarray(np.pad(actions[start : start + batch], ((0, batch - len(part)), (0, 0)))),)
        arrays = evaluate_without_drops(passes, layout, key_batch, capacity, given) | {
            "bytes": np.asarray(layout.bytes)
        }
        if passes.off_policy and actions is None:
            for name in ("greedy", "as_trained"):
                forced = evaluate_without_drops(passes, layout, key_batch, capacity, (jnp.asarray(arrays[name]),))
                arrays[f"log_prob_{name}"] = forced["log_prob"]
        yield part, {name: array[: len(part)] for name, array in arrays.items()}


def evaluate_without_drops(
    passes: AbstractPass, layout: Layout, key: PRNGKeyArray, capacity: int, actions: Actions = ()
) -> dict[str, np.ndarray]:
    """The fields of `ByteResults` but `decided` for one batch, with sampled boundaries or `actions`. No boundary is dropped.

    The first pass has a capacity of `capacity` tokens per sequence. Each sequence with more tokens is evaluated again, alone,
    with the same outermost boundaries and a capacity of all its bytes. The usual case thus costs one pass at `capacity`.
    `entropy` is NaN where the policy did not decide; `early_log_prob` is NaN without an early head.
    """
    result = passes.results(layout, key, capacity, actions)
    arrays = {name: np.array(array) for name, array in vars(result).items() if array is not None}
    for number in np.flatnonzero(arrays["overflow"]):
        one = slice(number, number + 1)
        alone = jax.tree.map(lambda leaf, one=one: leaf[one], layout)
        again = passes.results(alone, key, None, (jnp.asarray(arrays["drawn"][one]),))
        # `as_trained` stays: other boundaries would be sampled in a batch of one.
        for name in arrays.keys() - {"as_trained"}:
            arrays[name][one] = np.asarray(getattr(again, name))
    # Undefined values become NaN outside compiled code, since `jax_debug_nans` raises for NaN inside it.
    arrays["entropy"] = np.where(arrays.pop("decided"), arrays["entropy"], np.float32(np.nan))
    arrays.setdefault("early_log_prob", np.full_like(arrays["log_prob"], np.nan))
    return arrays


class ValidationAccumulator:
    """Accumulates validation results over batches: sums, sums by document and, for the areas under ROC curves, the
    probabilities at positions where no boundary is forced."""

    def __init__(self):
        values = jnp.arange(256)
        # For each byte value, whether it is white space, and whether it is spacelike.
        self._classes = [np.asarray(is_whitespace(values)), np.asarray(is_spacelike(values))]
        self._sums: dict[str, float] = {}
        self._tokens: np.ndarray | int = 0
        self._documents = np.zeros((2, 0))
        self._counts = np.zeros((len(self._classes), 5), np.int64)
        self._probs: list[np.ndarray] = []
        self._positive: list[list[np.ndarray]] = [[] for _ in self._classes]

    def add(self, results: dict[str, np.ndarray]) -> None:
        """Add the results of `evaluate_batches` for one batch. `documents`, the document number of each byte, is optional."""
        scored, valid, free = results["scored"], results["valid"], results["free"]
        decided = ~np.isnan(results["entropy"]) & valid
        sums = {
            "predicted": int(scored.sum()),
            "valid": int(valid.sum()),
            "drawn": int(results["sampled"].sum()),
            "overflow": int(results["overflow"].sum()),
            "decided": int(decided.sum()),
            "entropy": float(results["entropy"][decided].sum(dtype=np.float64)),
        }
        if "constrained" in results:
            unheld = valid & ~results["constrained"]
            sums |= {"unheld": int(unheld.sum()), "drawn_unheld": int((results["sampled"] & unheld).sum())}
        # Log-probabilities of the model, of the early head and, for an off-policy router, under other boundaries.
        log_probs = {name: array for name, array in results.items() if "log_prob" in name}
        sums |= {name: float(array[scored].sum(dtype=np.float64)) for name, array in log_probs.items()}
        self._sums = {name: self._sums.get(name, 0) + value for name, value in sums.items()}
        self._tokens = self._tokens + results["tokens"].sum(axis=0, dtype=np.int64)
        if "documents" in results:
            self._add_documents(results["documents"][scored], -results["log_prob"][scored])
        self._probs.append(results["probs"][free])
        for number, members in enumerate(self._classes):
            target = members[results["bytes"]]
            self._counts[number] += _count_boundaries(results, target)
            self._positive[number].append(target[free])

    def _add_documents(self, documents: np.ndarray, nats: np.ndarray) -> None:
        size = max(self._documents.shape[1], int(documents.max(initial=-1)) + 1)
        self._documents = np.pad(self._documents, ((0, 0), (0, size - self._documents.shape[1])))
        self._documents[0] += np.bincount(documents, weights=nats, minlength=size)
        self._documents[1] += np.bincount(documents, minlength=size)

    def validation(self) -> Validation:
        """The results over all batches."""
        sums, predicted = self._sums, int(self._sums["predicted"])

        def bits(name: str) -> float:
            return float(equations.bits_per_byte(-sums.get(name, math.nan), predicted))

        probs = np.concatenate(self._probs)
        sorted_probs = np.sort(probs)
        whitespace, spacelike = (
            _agreement(counts, area_under_roc(probs, np.concatenate(positive), sorted_probs))
            for counts, positive in zip(self._counts, self._positive, strict=True)
        )
        return Validation(
            bpb=bits("log_prob"),
            early_bpb=bits("early_log_prob"),
            rate=sums["drawn"] / sums["valid"],
            policy_entropy=sums["entropy"] / sums["decided"] if sums["decided"] else math.nan,
            overflow=sums["overflow"] / sums["valid"],
            bytes=predicted,
            whitespace=whitespace,
            spacelike=spacelike,
            inner_rates=inner_rates(np.asarray(self._tokens)),
            bpb_greedy=bits("log_prob_greedy"),
            bpb_as_trained=bits("log_prob_as_trained"),
            bpb_error=float(equations.bits_per_byte_error(*jnp.asarray(self._documents, jnp.float32))),
            documents=int((self._documents[1] > 0).sum()),
            probability=probability_shares(probs) if sums["drawn"] else {},
            free_rate=sums["drawn_unheld"] / sums["unheld"] if sums.get("unheld") else math.nan,
        )


def probability_shares(probs: np.ndarray) -> dict[str, float]:
    """Shares of the probabilities in [i/n, (i+1)/n), by i, for the n = `PROBABILITY_BINS`; 1 is in the last. Empty for none."""
    counts, _ = np.histogram(probs, PROBABILITY_BINS, (0.0, 1.0))
    return {str(number): float(count / probs.size) for number, count in enumerate(counts)} if probs.size else {}


def inner_rates(tokens: np.ndarray) -> tuple[float, ...]:
    """For each inner level, its number of tokens divided by that of the next outer level. `tokens`: tokens of each level."""
    return tuple(float(inner / outer) for outer, inner in itertools.pairwise(tokens))


def summarise(results: dict[str, np.ndarray]) -> Validation:
    """The validation results for the output of `evaluate_rows`. `bpb_error` is undefined without document numbers."""
    accumulator = ValidationAccumulator()
    accumulator.add(results)
    return accumulator.validation()


def agreement(results: dict[str, np.ndarray], target: np.ndarray) -> Agreement:
    """Boundaries as a classifier of the bytes where `target` is True. Positions with forced boundaries do not count."""
    free = results["free"]
    return _agreement(_count_boundaries(results, target), area_under_roc(results["probs"][free], target[free]))


def _count_boundaries(results: dict[str, np.ndarray], target: np.ndarray) -> np.ndarray:
    """Counts over positions where no boundary is forced: true positives of greedy boundaries, greedy boundaries, true positives
    of sampled boundaries, sampled boundaries, targets."""
    free = results["free"]
    greedy, sampled, actual = results["greedy"] & free, results["sampled"] & free, target & free
    return np.array([part.sum() for part in (greedy & actual, greedy, sampled & actual, sampled, actual)])


def _agreement(counts: np.ndarray, area: float) -> Agreement:
    """`counts`: those of `_count_boundaries`. `area`: the area under the ROC curve."""
    greedy_positives, greedy, sampled_positives, sampled, actual = (int(count) for count in counts)
    return Agreement(
        area,
        *_precision_recall_f1(greedy_positives, greedy, actual),
        *_precision_recall_f1(sampled_positives, sampled, actual),
    )


def area_under_roc(scores: np.ndarray, positive: np.ndarray, sorted_scores: np.ndarray | None = None) -> float:
    """Probability that a positive has a higher score than a negative; ties count one half. NaN without both kinds.

    `sorted_scores`: the sorted scores, if the caller has them already.
    """
    positives = int(positive.sum())
    negatives = positive.size - positives
    if not positives or not negatives:
        return math.nan
    ordered = np.sort(scores) if sorted_scores is None else sorted_scores
    own = np.sort(scores[positive])
    # Twice the mean rank of each positive among all scores, which is an integer.
    ranks = np.searchsorted(ordered, own, "left") + np.searchsorted(ordered, own, "right") + 1
    rank_sum = int(ranks.sum(dtype=np.int64)) / 2
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def _precision_recall_f1(true_positives: int, predicted: int, actual: int) -> tuple[float, float, float]:
    precision = true_positives / predicted if predicted else math.nan
    recall = true_positives / actual if actual else math.nan
    return precision, recall, 2 * true_positives / (predicted + actual) if predicted + actual else math.nan
