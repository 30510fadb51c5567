"""Entropy rules: closed forms, BLT's program in plain Python, and thresholds that meet their rate."""

import functools
import itertools
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import CombinedRule, Entropy, EntropyRouter, GlobalRule, RiseRule, SamplingOptions
from estimators import equations as eq
from estimators.routers.entropy import find_threshold, next_byte_entropy, patch_ends
from tests.conftest import predict, small_model, text_bytes
from unet import Chunker, Distribute, Select
from unet.likelihood import plain_layout
from unet.ops import boundary_scan


def test_entropy_of_known_distributions():
    probs = np.array([[0.5, 0.25, 0.25, 0.0], [0.25] * 4, [1.0, 0.0, 0.0, 0.0]])
    logits = jnp.asarray(np.log(probs + 1e-30), jnp.float32)
    np.testing.assert_allclose(eq.entropy(logits), [1.5 * np.log(2), np.log(4), 0.0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(eq.entropy(logits.astype(jnp.bfloat16)), eq.entropy(logits), rtol=2e-2, atol=1e-3)


def test_the_entropy_of_a_row_is_that_of_its_own_prediction():
    model, layout = small_model(), plain_layout(text_bytes(2, 10))
    found = eqx.filter_jit(next_byte_entropy)(model, layout)
    logits = np.asarray(predict(model, layout.bytes).logits, np.float64)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found, -(probs * np.log(probs)).sum(-1), rtol=1e-4)


def patch_starts(entropies, name, threshold, increase=0.0):
    """Where BLT's program starts the patches of one text behind BOS, the byte after the last included: a list of booleans."""
    # What BOS predicts is left out: the first byte starts a patch whatever it is.
    known = list(entropies[1:])
    rises = [False] + [here - before for before, here in itertools.pairwise(known)]
    mask = [False] * len(known)
    if name == "global":
        mask = [here > threshold for here in known]
    elif known:
        mask[0] = True
        # The program negates the mask as it stands before any candidate is written to it.
        free = [not set_before for set_before in mask]
        for place in range(1, len(known)):
            if name == "rise":
                mask[place] = rises[place] > threshold
            else:
                mask[place] = known[place] > threshold and rises[place] > increase and free[place - 1]
    return [True, True, *mask]


RULES = [
    ("global", GlobalRule),
    ("rise", RiseRule),
    ("combined", CombinedRule),
    ("combined", functools.partial(CombinedRule, increase=-0.5)),
    ("combined", functools.partial(CombinedRule, increase=0.2)),
]


def noisy(batch=3, length=40):
    return jax.random.uniform(jax.random.key(0), (batch, length)) * 4


@pytest.mark.parametrize(("name", "rule"), RULES, ids=str)
def test_the_rules_are_those_of_the_program(name, rule):
    """In documents side by side too, some as short as one byte."""
    values = noisy(3, 40)
    lengths = ((40,), (1, 2, 3, 4, 5, 25), (17, 23))
    document_positions = jnp.asarray([[i for length in row for i in range(length)] for row in lengths])
    for threshold in (-0.5, 0.0, 1.0, 2.5):
        made = rule(threshold)
        found = patch_ends(made, values, document_positions)
        for sequence, row in enumerate(lengths):
            first = 0
            for length in row:
                here = np.asarray(values[sequence, first : first + length])
                increase = float(made.increase()) if name == "combined" else 0.0
                wanted = patch_starts(here, name, threshold, increase)
                # A patch that starts with the next byte ends with this one.
                assert found[sequence, first : first + length].tolist() == wanted[1:], (threshold, sequence)
                first += length


def test_consecutive_candidates_all_end_patches():
    """BLT excludes one byte near the start of a text, not every second candidate."""
    climbing = jnp.arange(8.0)[None]
    ends = patch_ends(CombinedRule(0.5), climbing, jnp.arange(8)[None])
    assert ends[0].tolist() == [True, True, False, True, True, True, True, True]


def starts_of(lengths, total):
    """The starts that patch lengths say, the byte after the text included; lengths behind the last patch mean nothing."""
    starts, place = [False] * (total + 1), 0
    for length in lengths:
        if place <= total:
            starts[place] = True
        place += max(int(length), 0)
    return starts


def test_the_global_rule_makes_the_patches_of_a_small_blt(golden):
    z = golden("blt")
    threshold = json.loads(str(z["config"]))["patching_threshold"]
    document_positions = jnp.broadcast_to(jnp.arange(96), z["entropies"].shape)
    ends = patch_ends(GlobalRule(threshold), jnp.asarray(z["entropies"]), document_positions)
    for found, lengths in zip(ends, z["patch_lengths"], strict=True):
        wanted = starts_of(lengths, 96)
        assert found.tolist()[:95] == wanted[1:96]
        assert sum(wanted) > 20


@pytest.mark.parametrize(
    ("rate", "rule"), [(0.1, GlobalRule), (0.25, RiseRule), (0.1, RULES[4][1]), (0.25, RULES[3][1])]
)
def test_thresholds_meet_their_rate(rate, rule):
    values, document_positions = noisy(8, 200), np.broadcast_to(np.arange(200), (8, 200))
    threshold = find_threshold(np.asarray(values), document_positions, rate, rule)
    assert abs(float(jnp.mean(patch_ends(rule(threshold), values, jnp.asarray(document_positions)))) - rate) < 0.005


def test_a_rate_that_no_threshold_reaches_is_refused():
    with pytest.raises(ValueError, match="smaller increase"):
        find_threshold(
            np.asarray(noisy()),
            np.broadcast_to(np.arange(40), (3, 40)),
            0.4,
            functools.partial(CombinedRule, increase=2.0),
        )


def test_the_byte_model_and_the_thresholds_are_left_alone():
    router = EntropyRouter(small_model(seed=4), CombinedRule(5.0), target_rate=0.3)
    model = small_model(Entropy(router, chunker=Chunker(Select(), Distribute())))
    gradients = eqx.filter_jit(eqx.filter_grad(lambda m: m.loss(text_bytes(2, 12), key=None).loss))(model)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(gradients.stage.estimator))
    assert any(jnp.any(leaf) for leaf in jax.tree.leaves(gradients.stage.encoder))


def test_boundaries_stand_before_bytes_that_the_byte_model_does_not_foresee():
    byte_model, layout = small_model(seed=4), plain_layout(text_bytes(2, 12))
    entropies = eqx.filter_jit(next_byte_entropy)(byte_model, layout)
    threshold = float(jnp.median(entropies))
    router = EntropyRouter(byte_model, GlobalRule(threshold), target_rate=0.5)
    boundaries = router(jnp.zeros((2, 12, 1)), layout, SamplingOptions(boundary_scan))
    np.testing.assert_array_equal(boundaries.actions[:, 1:], entropies[:, 1:] > threshold)
    assert jnp.all(boundaries.actions[:, 0])
