"""Entropy rules: closed forms, plain loops, and thresholds that meet their rate."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import Draw, Entropy, EntropyRouter
from estimators import equations as eq
from estimators.entropy import find_threshold, over_both, over_threshold, surprise
from tests.conftest import predict, small_model, text_bytes
from unet import SelectDistribute
from unet.likelihood import plain_layout
from unet.ops import boundary_scan


def test_entropy_of_known_distributions():
    probs = np.array([[0.5, 0.25, 0.25, 0.0], [0.25] * 4, [1.0, 0.0, 0.0, 0.0]])
    logits = jnp.asarray(np.log(probs + 1e-30), jnp.float32)
    np.testing.assert_allclose(eq.entropy(logits), [1.5 * np.log(2), np.log(4), 0.0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(eq.entropy(logits.astype(jnp.bfloat16)), eq.entropy(logits), rtol=2e-2, atol=1e-3)


def test_surprise_is_the_entropy_of_the_prediction_of_the_byte_itself():
    model, layout = small_model(), plain_layout(text_bytes(2, 10))
    found = eqx.filter_jit(surprise)(model, layout)
    logits = np.asarray(predict(model, layout.bytes).logits, np.float64)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found[:, 1:], -(probs * np.log(probs)).sum(-1)[:, :-1], rtol=1e-4)
    assert jnp.all(jnp.isinf(found[:, 0]))


def noisy(batch=3, length=40):
    values = jax.random.uniform(jax.random.key(0), (batch, length)) * 4
    starts = jnp.zeros((batch, length), bool).at[:, 0].set(True).at[1, 17].set(True)
    return jnp.where(starts, jnp.inf, values), starts


def test_the_combined_rule_equals_a_loop():
    values, starts = noisy()
    found = over_both(values, starts, 1.0, -0.5)
    for b in range(3):
        previous = False
        for i in range(40):
            rises = i > 0 and not starts[b, i - 1] and values[b, i] - values[b, i - 1] > -0.5
            wanted = bool(starts[b, i]) or (bool(values[b, i] > 1.0) and bool(rises) and not previous)
            assert bool(found[b, i]) == wanted, (b, i)
            previous = wanted


@pytest.mark.parametrize("rate", [0.1, 0.25])
@pytest.mark.parametrize("increase", [None, 0.2])
def test_thresholds_meet_their_rate(rate, increase):
    values, starts = noisy(8, 200)
    threshold = find_threshold(np.asarray(values), np.asarray(starts), rate, increase)
    drawn = over_threshold(values, threshold) if increase is None else over_both(values, starts, threshold, increase)
    assert abs(float(jnp.mean(drawn)) - rate) < 0.005


def test_a_rate_that_no_threshold_reaches_is_refused():
    values, starts = noisy()
    with pytest.raises(ValueError, match="smaller increase"):
        find_threshold(np.asarray(values), np.asarray(starts), 0.4, increase=2.0)


def test_the_byte_model_is_left_alone():
    router = EntropyRouter(small_model(seed=4), 5.4, target_rate=0.3)
    model = small_model(Entropy(router, chunker=SelectDistribute()))
    gradients = eqx.filter_jit(eqx.filter_grad(lambda m: m.loss(text_bytes(2, 12), key=None).loss))(model)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(gradients.stage.estimator))
    assert any(jnp.any(leaf) for leaf in jax.tree.leaves(gradients.stage.encoder))


def test_boundaries_stand_where_the_byte_model_was_unsure():
    byte_model, layout = small_model(seed=4), plain_layout(text_bytes(2, 12))
    unsure = eqx.filter_jit(surprise)(byte_model, layout)
    threshold = float(jnp.median(unsure))
    router = EntropyRouter(byte_model, threshold, target_rate=0.5)
    boundaries = router(jnp.zeros((2, 12, 1)), layout, Draw(boundary_scan))
    np.testing.assert_array_equal(boundaries.actions, unsure > threshold)
