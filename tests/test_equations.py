"""Each equation against its closed form or a plain loop."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimators import equations as eq

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def random(shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


def test_soft_cap_is_bounded_odd_and_near_the_identity_for_small_logits():
    logits = jnp.linspace(-50, 50, 101)
    capped = eq.soft_cap(logits, 6.0)
    assert jnp.all(jnp.abs(capped) <= 6.0)
    np.testing.assert_allclose(capped, -capped[::-1], **TOLERANCE)
    np.testing.assert_allclose(eq.soft_cap(jnp.array([0.01]), 6.0), [6 * math.tanh(0.01 / 6)], rtol=1e-6)
    assert jax.grad(lambda x: eq.soft_cap(x, 6.0))(0.0) == pytest.approx(1.0)


@pytest.mark.parametrize("prob", [1e-6, 0.2, 0.5, 0.999])
def test_logit_inverts_the_sigmoid(prob):
    assert 1 / (1 + math.exp(-eq.logit(prob))) == pytest.approx(prob)


@pytest.mark.parametrize("prob", [0.0, 1.0, -0.1, 1.5])
def test_logit_refuses_what_has_none(prob):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        eq.logit(prob)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(0, 4), st.integers(0, 10_000))
def test_windowed_logits_equal_a_loop_over_remembered_actions(length, window, seed):
    rng = np.random.default_rng(seed)
    projections = rng.normal(size=(2, length, window + 1)).astype(np.float32)
    actions = rng.random((2, length)) < 0.5
    starts = rng.random((2, length)) < 0.3
    starts[:, 0] = True
    expected = projections[..., 0].copy()
    for b in range(2):
        for i in range(length):
            for j in range(1, window + 1):
                same_document = i - j >= 0 and not starts[b, i - j + 1 : i + 1].any()
                if same_document and actions[b, i - j]:
                    expected[b, i] += projections[b, i, j]
    got = eq.windowed_logits(jnp.asarray(projections), jnp.asarray(actions), jnp.asarray(starts))
    np.testing.assert_allclose(got, expected, **TOLERANCE)


def test_action_log_prob_is_the_bernoulli_log_likelihood_and_stays_finite():
    logits = jnp.array([[-2.0, 0.5, 200.0, -200.0]])
    actions = jnp.array([[True, False, False, True]])
    p = 1 / (1 + np.exp(-np.array([-2.0, 0.5])))
    got = eq.action_log_prob(logits, actions)
    np.testing.assert_allclose(got[0, :2], [np.log(p[0]), np.log(1 - p[1])], rtol=1e-6)
    np.testing.assert_allclose(got[0, 2:], [-200.0, -200.0])


def test_bernoulli_entropy_matches_its_definition_and_vanishes_at_certainty():
    logits = jnp.array([[-3.0, 0.0, 1.0, 90.0]])
    p = 1 / (1 + np.exp(-np.asarray(logits)[0, :3].astype(np.float64)))
    got = eq.bernoulli_entropy(logits)[0]
    np.testing.assert_allclose(got[:3], -p * np.log(p) - (1 - p) * np.log(1 - p), rtol=1e-5)
    assert got[3] == pytest.approx(0.0, abs=1e-30)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.sampled_from([0.0, 0.5, 0.99, 1.0]), st.integers(0, 10_000))
def test_discounted_returns_equal_a_backward_loop_that_stops_between_documents(length, discount, seed):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(2, length)).astype(np.float32)
    continues = rng.random((2, length)) < 0.7
    expected = np.zeros_like(rewards)
    following = np.zeros(2)
    for i in reversed(range(length)):
        following = rewards[:, i] + discount * following * continues[:, i]
        expected[:, i] = following
    np.testing.assert_allclose(
        eq.discounted_returns(jnp.asarray(rewards), discount, jnp.asarray(continues)), expected, rtol=1e-4, atol=1e-5
    )


def test_discounted_returns_of_equal_rewards_are_a_geometric_sum():
    got = eq.discounted_returns(jnp.ones((1, 50)), 0.9)[0]
    np.testing.assert_allclose(got, (1 - 0.9 ** np.arange(50, 0, -1)) / (1 - 0.9), rtol=1e-5)


def test_batch_centred_returns_have_mean_zero_over_the_valid_sequences():
    returns, mask = random((5, 7)), random((5, 7), 1) > -0.5
    centred = eq.batch_centred(returns, mask)
    np.testing.assert_allclose(jnp.sum(centred, axis=0), np.zeros(7), atol=1e-5)
    assert jnp.all(jnp.where(mask, 0.0, centred) == 0.0)


def test_leave_one_out_centring_subtracts_the_mean_of_the_others():
    returns, mask = np.asarray(random((4, 6))), np.array(random((4, 6), 1) > -0.3)
    mask[:, 0] = [True, False, False, False]
    got = eq.batch_centred(jnp.asarray(returns), jnp.asarray(mask), leave_one_out=True)
    for b in range(4):
        for i in range(6):
            others = [returns[c, i] for c in range(4) if c != b and mask[c, i]]
            expected = (returns[b, i] - (np.mean(others) if others else 0.0)) * mask[b, i]
            assert float(got[b, i]) == pytest.approx(float(expected), abs=1e-5)


def test_centring_with_and_without_the_sequence_itself_differ_by_their_known_factor():
    returns = random((6, 9))
    np.testing.assert_allclose(
        eq.batch_centred(returns), eq.batch_centred(returns, leave_one_out=True) * (5 / 6), **TOLERANCE
    )


def test_policy_loss_is_a_mean_whose_gradient_ignores_the_advantages():
    log_prob, advantages, mask = random((3, 4)), random((3, 4), 1), random((3, 4), 2) > 0
    expected = -float(jnp.sum(jnp.where(mask, log_prob * advantages, 0.0))) / int(mask.sum())
    assert float(eq.policy_loss(log_prob, advantages, mask)) == pytest.approx(expected, rel=1e-5)
    assert jnp.all(jax.grad(eq.policy_loss, argnums=1)(log_prob, advantages, mask) == 0)
    assert float(eq.policy_loss(log_prob, advantages, jnp.zeros_like(mask))) == 0.0


def test_rate_loss_presses_every_logit_alike_in_proportion_to_the_excess():
    logits, mask = random((3, 4)), jnp.ones((3, 4), bool)
    probs = jax.nn.sigmoid(logits)
    gradient = jax.grad(lambda x: eq.rate_loss(x, jax.nn.sigmoid(x), 0.2, mask))(logits)
    np.testing.assert_allclose(gradient, np.full((3, 4), (float(probs.mean()) - 0.2) / 12), rtol=1e-4)


def test_bits_per_byte_of_a_uniform_guess_is_eight():
    assert eq.bits_per_byte(100 * math.log(256), 100) == pytest.approx(8.0)


def test_the_error_of_bits_per_byte_is_what_the_ratio_of_fresh_documents_scatters_by():
    """Against the scatter of the ratio itself over many drawn sets of documents, whose size goes with their likelihood."""
    rng = np.random.default_rng(0)
    size = rng.integers(20, 200, (4000, 60))
    nats = size * rng.normal(0.7, 0.1, size.shape) + 10
    ratios = nats.sum(axis=1) / size.sum(axis=1) / math.log(2)
    errors = [
        float(eq.bits_per_byte_error(jnp.asarray(one), jnp.asarray(of)))
        for one, of in zip(nats[:50], size[:50] * 1.0, strict=True)
    ]
    assert np.mean(errors) == pytest.approx(ratios.std(), rel=0.05)


def test_the_error_of_bits_per_byte_by_hand():
    error = eq.bits_per_byte_error
    # Ratios of 1 and 3 nats a byte around 2: residuals of 10, twice, over 20 bytes.
    assert error(jnp.array([10.0, 30.0]), jnp.array([10.0, 10.0])) == pytest.approx(
        math.sqrt(2 * 200) / 20 / math.log(2)
    )
    assert error(jnp.array([10.0, 30.0, 0.0]), jnp.array([10.0, 10.0, 0.0])) == pytest.approx(1 / math.log(2))
    assert error(jnp.array([3.0, 6.0]), jnp.array([10.0, 20.0])) == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(error(jnp.array([10.0]), jnp.array([10.0])))
