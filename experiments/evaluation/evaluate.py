"""Validation: how well the model predicts held-out bytes, and where it draws boundaries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from data import HeldOutRow, Row
from estimators import AbstractOffPolicyRouter, Layout, equations
from estimators.routers.rules import is_spacelike, is_whitespace
from unet.hierarchy import Hierarchy, StageSampling
from unet.likelihood import continues, next_logprobs, plain_layout
from unet.losses import early_log_prob
from unet.model import UNet

AnyRow = TypeVar("AnyRow", bound=Row)


class Evaluated(eqx.Module):
    """What evaluation keeps of each byte of a batch. Without a token level there are no boundaries and probabilities are 0."""

    log_prob: Float[Array, "batch length"]
    early_log_prob: Float[Array, "batch length"] | None
    scored: Bool[Array, "batch length"]
    probs: Float[Array, "batch length"]
    entropy: Float[Array, "batch length"]
    """That of the policy where it `decided`."""
    decided: Bool[Array, "batch length"]
    sampled: Bool[Array, "batch length"]
    greedy: Bool[Array, "batch length"]
    valid: Bool[Array, "batch length"]
    free: Bool[Array, "batch length"]
    overflow: Int[Array, " batch"]
    drawn: Bool[Array, "batch length"]
    """The boundaries before any were dropped."""
    as_trained: Bool[Array, "batch length"]
    """Those that training would have drawn, where another router draws them then; else none."""
    tokens: Int[Array, "batch levels"]
    """Tokens of each level of the hierarchy, the outermost first."""


@dataclass(frozen=True)
class Agreement:
    """How boundaries agree with a class of bytes: the area under the ROC curve of p, and precision, recall and F1 of the
    greedy (p > 0.5) and of the sampled boundaries. NaN where undefined; forced boundaries do not count."""

    auc: float
    precision: float
    recall: float
    f1: float
    sampled_precision: float
    sampled_recall: float
    sampled_f1: float


@dataclass(frozen=True)
class Validation:
    """Results on held-out text. `bpb`: bits per byte; `early_bpb`: of the early head, NaN without one; `rate`: share of
    bytes with a boundary; `policy_entropy`: of the policy, nats per decision; `overflow`: share of bytes whose boundary was
    dropped, 0 by construction; `bytes`: how many were predicted; `inner_rates`: of levels inside, the share of the tokens of
    the level around that close a token; `bpb_error`: the standard error of `bpb` over documents, NaN for one; `documents`: how
    many different ones were evaluated.

    Everything but two figures is judged on the boundaries that generation draws. Most estimators are trained on the same:
    policies sampled in both (`sfe…`, `gumbel`, `uniform`), `hnet` with greedy actions in both, and rules
    (`entropy`, `bpe`, `stride`, `characters` and the others), which leave no choice. Where another router draws in training
    (`AbstractOffPolicyRouter`: the guide of `bpe-distilled`, the behaviour policy of `sfe-offpolicy`) the model is judged on
    three kinds of boundaries at its first level: `bpb` is under the router's own, sampled; `bpb_greedy` under its own, greedy;
    `bpb_as_trained` under those of the other router, as in training. Both are NaN elsewhere."""

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


@eqx.filter_jit
def evaluate_batch(
    model: UNet,
    layout: Layout,
    key: PRNGKeyArray,
    capacity: int | None,
    actions: tuple[Bool[Array, "batch length"], ...] = (),
) -> Evaluated:
    """One forward pass with sampled boundaries (or the `actions` given), and the greedy boundaries beside it. `capacity`
    None: never drops any."""
    capacities = () if capacity is None else (capacity,)
    mask = layout.mask
    prediction = model(
        layout.bytes, key=key, actions=actions, segments=layout.segments, mask=mask, capacities=capacities
    )
    log_prob = next_logprobs(prediction.logits, layout.bytes)
    early = early_log_prob(prediction, layout)
    scored, nothing = continues(layout), jnp.zeros_like(mask)
    if not prediction.levels or not isinstance(model.stage, Hierarchy):
        zeros, none = jnp.zeros_like(log_prob), jnp.zeros(mask.shape[0], jnp.int32)
        tokens = jnp.zeros((mask.shape[0], 0), jnp.int32)
        return Evaluated(
            *(log_prob, early, scored, zeros, zeros, nothing, nothing, nothing, mask, nothing, none, nothing, nothing),
            tokens,
        )
    level = prediction.levels[0]
    greedy = model.stage.boundaries(level.hidden, layout, StageSampling()).actions
    taught = nothing
    if is_taught(model):
        taught = model.stage.boundaries(level.hidden, layout, StageSampling(key, training=True)).actions
    kept = level.boundaries
    return Evaluated(
        log_prob,
        early,
        scored,
        kept.probs,
        equations.bernoulli_entropy(kept.logits),
        kept.decided,
        kept.actions,
        greedy,
        mask,
        mask & ~layout.starts,
        level.overflow,
        level.drawn,
        taught,
        jnp.stack([one.lengths for one in prediction.levels], axis=1),
    )


def stack_rows(rows: Sequence[Row], batch: int) -> Layout:
    """The layout of exactly `batch` rows, the missing ones padding from end to end."""
    missing = batch - len(rows)

    def stack(name: Literal["bytes", "segments", "mask"]) -> Array:
        return jnp.asarray(np.pad(np.stack([row[name] for row in rows]), ((0, missing), (0, 0))))

    return plain_layout(stack("bytes"), stack("segments"), stack("mask"))


def is_taught(model: UNet) -> bool:
    """Whether another router draws the boundaries that its first level trains on."""
    return any(isinstance(estimator.router, AbstractOffPolicyRouter) for estimator in model.stage.estimators[:1])


def evaluate(model: UNet, rows: Sequence[HeldOutRow], *, batch: int, capacity: int, key: PRNGKeyArray) -> Validation:
    """Evaluate on all `rows`, `batch` at a time, dropping no boundary; three times where training draws other boundaries than
    generation (see `Validation`)."""
    tally = Tally()
    for part, kept in evaluated_batches(model, rows, batch=batch, capacity=capacity, key=key):
        tally.add({**kept, "documents": np.stack([row["documents"] for row in part])})
    return tally.validation()


def evaluate_rows(
    model: UNet,
    rows: Sequence[Row],
    *,
    batch: int,
    capacity: int,
    key: PRNGKeyArray,
    actions: Bool[np.ndarray, "rows length"] | None = None,
) -> dict[str, np.ndarray]:
    """What `evaluated_batches` keeps, for all `rows` at once: some 30 bytes a byte."""
    kept: dict[str, list[np.ndarray]] = {}
    for _, arrays in evaluated_batches(model, rows, batch=batch, capacity=capacity, key=key, actions=actions):
        for name, array in arrays.items():
            kept.setdefault(name, []).append(array)
    return {name: np.concatenate(parts) for name, parts in kept.items()}


def evaluated_batches(
    model: UNet,
    rows: Sequence[AnyRow],
    *,
    batch: int,
    capacity: int,
    key: PRNGKeyArray,
    actions: Bool[np.ndarray, "rows length"] | None = None,
) -> Iterator[tuple[Sequence[AnyRow], dict[str, np.ndarray]]]:
    """What `summarise` reads, for some `rows` after others: the fields of `Evaluated`, the `bytes`, and, where another router
    draws the boundaries of training, `log_prob_greedy` and `log_prob_as_trained`. With the `actions` given instead of sampled
    ones, and then once only."""
    batch = min(batch, len(rows))
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        layout = stack_rows(part, batch)
        key_batch = jax.random.fold_in(key, start)
        given = ()
        if actions is not None:
            given = (jnp.asarray(np.pad(actions[start : start + batch], ((0, batch - len(part)), (0, 0)))),)
        arrays = dropping_none(model, layout, key_batch, capacity, given) | {"bytes": np.asarray(layout.bytes)}
        if is_taught(model) and actions is None:
            for name in ("greedy", "as_trained"):
                forced = dropping_none(model, layout, key_batch, capacity, (jnp.asarray(arrays[name]),))
                arrays[f"log_prob_{name}"] = forced["log_prob"]
        yield part, {name: array[: len(part)] for name, array in arrays.items()}


def dropping_none(
    model: UNet,
    layout: Layout,
    key: PRNGKeyArray,
    capacity: int,
    actions: tuple[Bool[Array, "batch length"], ...] = (),
) -> dict[str, np.ndarray]:
    """The fields of `Evaluated` for one batch, with the `actions` given or those that are drawn, none dropped.

    It first runs at `capacity` tokens per sequence. A sequence that has more runs again, alone and with the same outermost
    boundaries, at a capacity of all its bytes. So the usual case costs what training costs.
    """
    result = evaluate_batch(model, layout, key, capacity, actions)
    arrays = {name: np.array(array) for name, array in vars(result).items() if array is not None}
    for number in np.flatnonzero(arrays["overflow"]):
        one = slice(number, number + 1)
        alone = jax.tree.map(lambda leaf, one=one: leaf[one], layout)
        again = evaluate_batch(model, alone, key, None, (result.drawn[one],))
        # What training would have drawn is drawn already, and alone would be drawn otherwise.
        for name in arrays.keys() - {"as_trained"}:
            arrays[name][one] = np.asarray(getattr(again, name))
    # What is undefined becomes NaN here, not in compiled code, where `jax_debug_nans` would stop at it.
    arrays["entropy"] = np.where(arrays.pop("decided"), arrays["entropy"], np.float32(np.nan))
    arrays.setdefault("early_log_prob", np.full_like(arrays["log_prob"], np.nan))
    return arrays


class Tally:
    """What an evaluation keeps of its batches: sums, the sums of each document and, for the areas under ROC curves, the
    probabilities at positions where no boundary is forced."""

    def __init__(self):
        values = jnp.arange(256)
        # For each value of a byte, whether it is in the class.
        self._classes = [np.asarray(is_whitespace(values)), np.asarray(is_spacelike(values))]
        self._sums: dict[str, float] = {}
        self._tokens: np.ndarray | int = 0
        self._documents = np.zeros((2, 0))
        self._hits = np.zeros((len(self._classes), 5), np.int64)
        self._probs: list[np.ndarray] = []
        self._positive: list[list[np.ndarray]] = [[] for _ in self._classes]

    def add(self, kept: dict[str, np.ndarray]) -> None:
        """A batch: the fields of `Evaluated`, the `bytes` and, where they are known, the `documents` that these belong to, and
        likelihoods under other boundaries."""
        scored, valid, free = kept["scored"], kept["valid"], kept["free"]
        decided = ~np.isnan(kept["entropy"]) & valid
        sums = {
            "predicted": int(scored.sum()),
            "valid": int(valid.sum()),
            "drawn": int(kept["sampled"].sum()),
            "overflow": int(kept["overflow"].sum()),
            "decided": int(decided.sum()),
            "entropy": float(kept["entropy"][decided].sum(dtype=np.float64)),
        }
        # Of the model, its early head and, where another router draws in training, under other boundaries.
        log_liks = {name: array for name, array in kept.items() if "log_prob" in name}
        sums |= {name: float(array[scored].sum(dtype=np.float64)) for name, array in log_liks.items()}
        self._sums = {name: self._sums.get(name, 0) + value for name, value in sums.items()}
        self._tokens = self._tokens + kept["tokens"].sum(axis=0, dtype=np.int64)
        if "documents" in kept:
            self._add_documents(kept["documents"][scored], -kept["log_prob"][scored])
        self._probs.append(kept["probs"][free])
        for number, members in enumerate(self._classes):
            target = members[kept["bytes"]]
            self._hits[number] += _hits(kept, target)
            self._positive[number].append(target[free])

    def _add_documents(self, documents: np.ndarray, nats: np.ndarray) -> None:
        size = max(self._documents.shape[1], int(documents.max(initial=-1)) + 1)
        self._documents = np.pad(self._documents, ((0, 0), (0, size - self._documents.shape[1])))
        self._documents[0] += np.bincount(documents, weights=nats, minlength=size)
        self._documents[1] += np.bincount(documents, minlength=size)

    def validation(self) -> Validation:
        """The results over all that was added."""
        sums, predicted = self._sums, int(self._sums["predicted"])

        def bits(name: str) -> float:
            return float(equations.bits_per_byte(-sums.get(name, math.nan), predicted))

        probs = np.concatenate(self._probs)
        order = np.sort(probs)
        whitespace, spacelike = (
            _agreement(counts, area_under_roc(probs, np.concatenate(positive), order))
            for counts, positive in zip(self._hits, self._positive, strict=True)
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
        )


def inner_rates(tokens: np.ndarray) -> tuple[float, ...]:
    """Tokens of each level inside the first as shares of those of the level around it, from their numbers by level."""
    return tuple(float(inside / around) for around, inside in itertools.pairwise(tokens))


def summarise(kept: dict[str, np.ndarray]) -> Validation:
    """The results of what `evaluate_rows` returns; without `documents` there is no error over them."""
    tally = Tally()
    tally.add(kept)
    return tally.validation()


def agreement(kept: dict[str, np.ndarray], target: np.ndarray) -> Agreement:
    """How boundaries agree with the bytes for which `target` is True, over positions where none is forced."""
    free = kept["free"]
    return _agreement(_hits(kept, target), area_under_roc(kept["probs"][free], target[free]))


def _hits(kept: dict[str, np.ndarray], target: np.ndarray) -> np.ndarray:
    """Of the positions where no boundary is forced, how many are greedy and in `target`, greedy, sampled and in it, sampled,
    and in it."""
    free = kept["free"]
    greedy, sampled, wanted = kept["greedy"] & free, kept["sampled"] & free, target & free
    return np.array([part.sum() for part in (greedy & wanted, greedy, sampled & wanted, sampled, wanted)])


def _agreement(counts: np.ndarray, area: float) -> Agreement:
    """From what `_hits` counts and the `area` under the ROC curve."""
    greedy_hits, greedy, sampled_hits, sampled, wanted = (int(count) for count in counts)
    return Agreement(
        area,
        *_precision_recall_f1(greedy_hits, greedy, wanted),
        *_precision_recall_f1(sampled_hits, sampled, wanted),
    )


def area_under_roc(scores: np.ndarray, positive: np.ndarray, order: np.ndarray | None = None) -> float:
    """Probability that a positive scores higher than a negative, ties counted half; NaN without both kinds.

    `order`: the scores, sorted, if they are at hand.
    """
    positives = int(positive.sum())
    negatives = positive.size - positives
    if not positives or not negatives:
        return math.nan
    order = np.sort(scores) if order is None else order
    found = np.sort(scores[positive])
    # Twice the mean rank of each positive among all: whole numbers.
    ranks = np.searchsorted(order, found, "left") + np.searchsorted(order, found, "right") + 1
    rank_sum = int(ranks.sum(dtype=np.int64)) / 2
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def _precision_recall_f1(hits: int, drawn: int, there: int) -> tuple[float, float, float]:
    precision = hits / drawn if drawn else math.nan
    recall = hits / there if there else math.nan
    return precision, recall, 2 * hits / (drawn + there) if drawn + there else math.nan
