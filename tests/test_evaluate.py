"""Validation results against brute force. No boundary is dropped."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.rows import HeldOutRow, make_row
from estimators import (
    Bernoulli,
    Estimator,
    Greedy,
    Guided,
    Isotropic,
    NoObjective,
    OffPolicy,
    PrefixRouter,
    PrefixTree,
    equations,
)
from experiments.evaluation.byte_results import LocalPass
from experiments.evaluation.evaluate import ValidationAccumulator, agreement, area_under_roc, evaluate, summarise
from tests.conftest import predict, small_model, small_score_function, text_bytes
from unet import Chunker, Distribute, Select, next_logprobs
from unet.shading.characters import characters, colour_of


def test_the_area_under_the_curve_counts_ordered_pairs():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 5, 60) / 5, rng.random(60) < 0.3
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[positive] for n in scores[~positive]]
    assert area_under_roc(scores, positive) == pytest.approx(np.mean(pairs))
    assert math.isnan(area_under_roc(scores, np.zeros(60, bool)))


def test_agreement_is_precision_recall_and_f1_over_free_rows():
    target = np.array([[1, 1, 0, 0, 1, 0]], bool)
    kept = {
        "free": np.array([[0, 1, 1, 1, 1, 1]], bool),
        "probs": np.array([[0.9, 0.8, 0.7, 0.1, 0.6, 0.2]]),
        "greedy": np.array([[1, 1, 1, 0, 1, 0]], bool),
        "sampled": np.array([[1, 0, 0, 0, 1, 0]], bool),
    }
    got = agreement(kept, target)
    assert (got.precision, got.recall) == (2 / 3, 1.0)
    assert got.f1 == pytest.approx(0.8)
    assert (got.sampled_precision, got.sampled_recall) == (1.0, 0.5)
    assert got.auc == pytest.approx(5 / 6)


@pytest.fixture(scope="module")
def rows():
    values = np.asarray(text_bytes(5, 20), np.uint8)
    return [
        HeldOutRow(**make_row([values[i, : 20 - 7 * (i % 2)]], 20), documents=np.full(20, i // 2, np.int32))
        for i in range(5)
    ]


def test_too_small_a_capacity_changes_nothing_but_the_time(rows):
    model = small_model(small_score_function())
    tight, wide = (evaluate(LocalPass(model), rows, batch=2, capacity=c, key=jax.random.key(0)) for c in (2, 20))
    assert tight.bpb == pytest.approx(wide.bpb, rel=1e-6)
    assert (tight.rate, tight.bytes, tight.whitespace) == (wide.rate, wide.bytes, wide.whitespace)
    assert wide.overflow == 0.0
    assert wide.bytes == sum(int(row["mask"].sum()) - 1 for row in rows)


def test_bits_per_byte_are_those_of_the_model(rows):
    model = small_model(Isotropic(chunker=Chunker(Select(), Distribute())))
    got = evaluate(LocalPass(model), rows, batch=3, capacity=20, key=jax.random.key(0))
    nats, sizes = np.zeros(3), np.zeros(3)
    for number, row in enumerate(rows):
        size = int(row["mask"].sum())
        bytes = jnp.asarray(row["bytes"][None, :size], jnp.int32)
        nats[number // 2] -= float(next_logprobs(predict(model, bytes).logits, bytes).sum())
        sizes[number // 2] += size - 1
    assert got.bpb == pytest.approx(nats.sum() / math.log(2) / got.bytes, rel=1e-5)
    error = equations.bits_per_byte_error(jnp.asarray(nats, jnp.float32), jnp.asarray(sizes, jnp.float32))
    assert got.bpb_error == pytest.approx(float(error), rel=1e-4)
    assert got.documents == 3
    assert got.rate == 1.0
    assert math.isnan(got.early_bpb)


@pytest.mark.parametrize("kind", ["guided", "off policy"])
def test_what_is_trained_on_others_boundaries_is_judged_on_theirs_and_on_its_own(rows, kind):
    own = small_score_function().router
    tree = PrefixTree([bytes([value]) for value in range(256)] + [bytes([value, 97]) for value in range(97, 123)])
    other = PrefixRouter(tree) if kind == "guided" else Bernoulli(0.6)

    def judged(router):
        model = small_model(Estimator(router, Chunker(Select(), Distribute()), NoObjective()))
        return evaluate(LocalPass(model), rows, batch=5, capacity=20, key=jax.random.key(0))

    got = judged(Guided(own, other) if kind == "guided" else OffPolicy(own, other))
    expected = {"bpb": judged(own), "bpb_greedy": judged(Greedy(own)), "bpb_as_trained": judged(other)}
    for name, alone in expected.items():
        assert getattr(got, name) == pytest.approx(alone.bpb, rel=1e-6)
        assert math.isnan(alone.bpb_greedy)
        assert math.isnan(alone.bpb_as_trained)
    assert len({round(alone.bpb, 5) for alone in expected.values()}) == 3
    assert got.rate == expected["bpb"].rate


def test_without_a_token_level_there_is_no_rate(rows):
    with jax.debug_nans(True):
        got = evaluate(LocalPass(small_model(None)), rows, batch=5, capacity=20, key=jax.random.key(0))
    assert got.rate == 0.0
    assert math.isfinite(got.bpb)
    assert math.isnan(got.policy_entropy)


def evaluated(rng, documents):
    """Random per-byte results of a batch."""
    shape = (len(documents), 9)
    kept = {name: rng.random(shape) < 0.6 for name in ("sampled", "greedy", "scored", "free")}
    kept |= {name: rng.random(shape).astype(np.float32) for name in ("probs", "entropy")}
    kept |= {"log_prob": -rng.random(shape, np.float32), "early_log_prob": np.full(shape, np.nan)}
    kept |= {"valid": np.ones(shape, bool), "overflow": np.zeros(len(documents)), "bytes": rng.integers(0, 254, shape)}
    return kept | {
        "tokens": np.full((len(documents), 2), [4, 1]),
        "documents": np.repeat(np.array(documents)[:, None], 9, 1),
    }


def test_batches_add_up():
    batches = [
        evaluated(np.random.default_rng(seed), documents) for seed, documents in enumerate(([3, 1], [1], [0, 3]))
    ]
    parts = ValidationAccumulator()
    for batch in batches:
        parts.add(batch)
    together = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    left, right = parts.validation(), summarise(together)
    assert (left.bytes, left.documents, left.inner_rates) == (int(together["scored"].sum()), 3, (0.25,))
    assert math.isnan(left.early_bpb)
    assert (left.whitespace, left.spacelike, left.rate) == (right.whitespace, right.spacelike, right.rate)
    nats = -together["log_prob"][together["scored"]].sum()
    assert left.bpb == pytest.approx(nats / math.log(2) / left.bytes, rel=1e-6)
    assert left.policy_entropy == pytest.approx(together["entropy"].mean(), rel=1e-6)
    free, space = together["free"], np.isin(together["bytes"], [9, 10, 11, 12, 13, 32])
    assert left.whitespace.auc == area_under_roc(together["probs"][free], space[free])


def test_the_error_of_a_validation_is_over_documents_however_they_are_cut_into_rows():
    """Two rows of one document are one sample. Counting each row as a document would give another error."""
    batch = evaluated(np.random.default_rng(0), [0, 0, 1, 2])
    accumulator = ValidationAccumulator()
    accumulator.add(batch)
    sums = [
        (-batch["log_prob"][rows][batch["scored"][rows]].sum(), batch["scored"][rows].sum())
        for rows in ([0, 1], [2], [3])
    ]
    nats, size = np.array(sums).T
    ratio = nats.sum() / size.sum()
    expected = math.sqrt(3 / 2 * ((nats - ratio * size) ** 2).sum()) / size.sum() / math.log(2)
    assert accumulator.validation().bpb_error == pytest.approx(expected, rel=1e-5)


def test_characters_carry_the_probability_of_their_last_byte():
    values = np.frombuffer("\xfe".encode("latin-1") + "aé€😀".encode() + b"\xa9", np.uint8)
    got = characters(values, np.arange(len(values)) / 100, np.arange(len(values)) % 2 == 1)
    assert [c.text for c in got] == ["▪", "a", "é", "€", "😀", "\ufffd"]
    assert [round(100 * c.prob) for c in got] == [0, 1, 3, 6, 10, 11]


def test_probabilities_shade_from_blue_to_red():
    low, high = colour_of(0.0), colour_of(1.0)
    assert low[2] > low[0]
    assert high[0] > high[2]
