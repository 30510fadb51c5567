"""Validation: how well the model predicts held-out bytes, and where it draws boundaries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from data import Row
from estimators import AbstractTaught, Layout, equations
from estimators.fixed import is_spacelike, is_whitespace
from unet.likelihood import continues, next_byte_log_lik, plain_layout
from unet.losses import early_log_lik
from unet.model import UNet
from unet.stage import Drawing, Hierarchy


class Evaluated(eqx.Module):
    """What evaluation keeps of a batch, all `batch length`; without a token level there are no boundaries and the
    probabilities are 0."""

    log_lik: Float[Array, "batch length"]
    early_log_lik: Float[Array, "batch length"]
    scored: Bool[Array, "batch length"]
    probs: Float[Array, "batch length"]
    entropy: Float[Array, "batch length"]
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
    bytes with a boundary; `entropy`: of the policy, nats per decision; `overflow`: share of bytes whose boundary was
    dropped, 0 by construction; `bytes`: how many were predicted; `inner_rates`: of levels inside, the share of the tokens of
    the level around that close a token.

    Everything but two figures is judged on the boundaries that generation draws. Most estimators are trained on the same:
    policies sampled in both (`sfe` and its kin, `gumbel`, `uniform`), `hnet` with its likelier actions in both, and rules
    (`entropy`, `bpe`, `stride`, `whitespace`, `spacelike`, `isotropic`), which leave no choice. Where another router draws in
    training (`AbstractTaught`: the guide of `bpe-distilled`, the behaviour policy of `sfe-offpolicy`) the model is judged on
    three kinds of boundaries at its first level: `bpb` is under the router's own, sampled; `bpb_greedy` under its own likelier
    ones; `bpb_as_trained` under those of the other router, as in training. Both are NaN elsewhere."""

    bpb: float
    early_bpb: float
    rate: float
    entropy: float
    overflow: float
    bytes: int
    whitespace: Agreement
    spacelike: Agreement
    inner_rates: tuple[float, ...] = ()
    bpb_greedy: float = math.nan
    bpb_as_trained: float = math.nan


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
    log_lik = next_byte_log_lik(prediction.logits, layout.bytes)
    early = early_log_lik(prediction, layout)
    early = jnp.full_like(log_lik, jnp.nan) if early is None else early
    scored, nothing = continues(layout), jnp.zeros_like(mask)
    if not prediction.levels or not isinstance(model.stage, Hierarchy):
        zeros, none = jnp.zeros_like(log_lik), jnp.zeros(mask.shape[0], jnp.int32)
        unknown = jnp.full_like(zeros, jnp.nan)
        tokens = jnp.zeros((mask.shape[0], 0), jnp.int32)
        return Evaluated(
            log_lik, early, scored, zeros, unknown, nothing, nothing, mask, nothing, none, nothing, nothing, tokens
        )
    level = prediction.levels[0]
    greedy = model.stage.route(level.hidden, layout, Drawing()).actions
    taught = nothing
    if is_taught(model):
        taught = model.stage.route(level.hidden, layout, Drawing(key, training=True)).actions
    kept = level.boundaries
    return Evaluated(
        log_lik,
        early,
        scored,
        kept.probs,
        jnp.where(kept.decided, equations.bernoulli_entropy(kept.logits), jnp.nan),
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
    """Whether its first level is trained on boundaries that another router draws."""
    return any(isinstance(estimator.router, AbstractTaught) for estimator in model.stage.estimators[:1])


def evaluate(model: UNet, rows: Sequence[Row], *, batch: int, capacity: int, key: PRNGKeyArray) -> Validation:
    """Evaluate on all `rows`, `batch` at a time, dropping no boundary; three times where training draws other boundaries than
    generation (see `Validation`)."""
    return summarise(evaluate_rows(model, rows, batch=batch, capacity=capacity, key=key))


def evaluate_rows(
    model: UNet,
    rows: Sequence[Row],
    *,
    batch: int,
    capacity: int,
    key: PRNGKeyArray,
    actions: Bool[np.ndarray, "rows length"] | None = None,
) -> dict[str, np.ndarray]:
    """What `summarise` reads, for all `rows`: the fields of `Evaluated`, the `bytes`, and, where another router draws the
    boundaries of training, `log_lik_greedy` and `log_lik_as_trained`. With the `actions` given instead of sampled ones, and then
    once only."""
    batch = min(batch, len(rows))
    kept: dict[str, list[np.ndarray]] = {}
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
                arrays[f"log_lik_{name}"] = forced["log_lik"]
        for name, array in arrays.items():
            kept.setdefault(name, []).append(array[: len(part)])
    return {name: np.concatenate(parts) for name, parts in kept.items()}


def dropping_none(
    model: UNet,
    layout: Layout,
    key: PRNGKeyArray,
    capacity: int,
    actions: tuple[Bool[Array, "batch length"], ...] = (),
) -> dict[str, np.ndarray]:
    """The fields of `Evaluated` for one batch, with the `actions` given or those that are drawn, none dropped.

    It first runs with `capacity` token rows per sequence; a sequence for which that is too few runs again, alone and with the
    same boundaries, with as many rows as it has bytes. So the usual case costs what training costs.
    """
    result = evaluate_batch(model, layout, key, capacity, actions)
    arrays = {name: np.array(array) for name, array in vars(result).items()}
    for number in np.flatnonzero(arrays["overflow"]):
        one = slice(number, number + 1)
        alone = jax.tree.map(lambda leaf, one=one: leaf[one], layout)
        again = evaluate_batch(model, alone, key, None, (result.drawn[one],))
        # What training would have drawn is drawn already, and alone would be drawn otherwise.
        for name in vars(again).keys() - {"as_trained"}:
            arrays[name][one] = np.asarray(getattr(again, name))
    return arrays


def summarise(kept: dict[str, np.ndarray]) -> Validation:
    """Results over all evaluated bytes; `kept` holds the fields of `Evaluated` and the `bytes`."""
    scored, valid = kept["scored"], kept["valid"]
    predicted = int(scored.sum())

    def bits(log_lik: np.ndarray) -> float:
        return float(equations.bits_per_byte(-float(log_lik[scored].sum(dtype=np.float64)), predicted))

    entropies = kept["entropy"][~np.isnan(kept["entropy"]) & valid]
    values = jnp.asarray(kept["bytes"])
    return Validation(
        bpb=bits(kept["log_lik"]),
        early_bpb=bits(kept["early_log_lik"]),
        rate=float(kept["sampled"].sum() / valid.sum()),
        entropy=float(entropies.mean()) if entropies.size else math.nan,
        overflow=float(kept["overflow"].sum() / valid.sum()),
        bytes=predicted,
        whitespace=agreement(kept, np.asarray(is_whitespace(values))),
        spacelike=agreement(kept, np.asarray(is_spacelike(values))),
        inner_rates=inner_rates(kept["tokens"]),
        bpb_greedy=bits(kept["log_lik_greedy"]) if "log_lik_greedy" in kept else math.nan,
        bpb_as_trained=bits(kept["log_lik_as_trained"]) if "log_lik_as_trained" in kept else math.nan,
    )


def inner_rates(tokens: np.ndarray) -> tuple[float, ...]:
    """Tokens of each level inside the first as shares of those of the level around it."""
    totals = tokens.sum(axis=0)
    return tuple(float(inside / around) for around, inside in itertools.pairwise(totals))


def agreement(kept: dict[str, np.ndarray], target: np.ndarray) -> Agreement:
    """How boundaries agree with the bytes for which `target` is True, over the rows where none is forced."""
    free = kept["free"]
    wanted = target[free]
    greedy = _precision_recall_f1(kept["greedy"][free], wanted)
    sampled = _precision_recall_f1(kept["sampled"][free], wanted)
    return Agreement(area_under_roc(kept["probs"][free], wanted), *greedy, *sampled)


def area_under_roc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive scores higher than a negative, ties counted half; NaN without both kinds."""
    positives = int(positive.sum())
    negatives = positive.size - positives
    if not positives or not negatives:
        return math.nan
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = float(mean_rank[inverse][positive].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def _precision_recall_f1(chosen: np.ndarray, wanted: np.ndarray) -> tuple[float, float, float]:
    hits, drawn, there = (int(part.sum()) for part in (chosen & wanted, chosen, wanted))
    precision = hits / drawn if drawn else math.nan
    recall = hits / there if there else math.nan
    return precision, recall, 2 * hits / (drawn + there) if drawn + there else math.nan
