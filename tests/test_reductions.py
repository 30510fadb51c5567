"""The further variance reductions against exact answers: every boundary string enumerated, and closed forms."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import (
    BatchCentre,
    Bernoulli,
    Boundaries,
    Critic,
    Discount,
    EarlyExit,
    GeneralisedAdvantage,
    ImportanceWeight,
    ObjectiveInputs,
    OffPolicy,
    SampleCentre,
    SamplingOptions,
    ScoreFunctionObjective,
)
from estimators import equations as eq
from tests.conftest import text_bytes
from tests.test_score_function import BATCH, LENGTH, expected_policy_gradient, joint_strings, policy_of
from tests.test_score_function import bytes as bytes
from tests.test_score_function import model as model
from tests.test_score_function import outcomes as outcomes
from unet.likelihood import plain_layout
from unet.ops import boundary_scan

DIM = 16
DISCOUNT = 0.7
CLOSE = {"rtol": 2e-4, "atol": 2e-6}


def objective(*reductions):
    return ScoreFunctionObjective(reductions, 0.3)


def lively_critic():
    weight = jax.random.normal(jax.random.key(3), (DIM,))
    return eqx.tree_at(lambda c: (c.weight, c.bias), Critic(DIM), (weight, jnp.asarray(0.7)))


def toy_signal(batch=3, length=8, samples=1):
    keys = jax.random.split(jax.random.key(0), 5)
    layout = plain_layout(text_bytes(batch, length))
    logits = jax.random.normal(keys[0], (batch, length))
    actions = jax.random.bernoulli(keys[1], 0.4, (batch, length)) | layout.starts
    boundaries = Boundaries(actions, logits, jax.nn.sigmoid(logits), ~layout.starts, layout.starts)
    mask = jnp.ones((batch, length), bool).at[:, -1].set(False)
    return ObjectiveInputs(
        boundaries,
        jax.random.normal(keys[2], (batch, length, DIM)),
        jnp.where(mask, jax.random.normal(keys[3], (batch, length)), 0.0),
        jnp.where(mask, jax.random.normal(keys[4], (batch, length)), 0.0),
        mask,
        mask,
        samples=samples,
    )


def test_a_critic_biases_nothing_whatever_it_expects(model, bytes, outcomes):
    plain, _ = expected_policy_gradient(model, bytes, outcomes, objective(Discount(DISCOUNT)))
    criticised, _ = expected_policy_gradient(model, bytes, outcomes, objective(Discount(DISCOUNT), lively_critic()))
    np.testing.assert_allclose(criticised, plain, **CLOSE)


def test_a_critic_that_fits_the_returns_lowers_the_variance(model, bytes, outcomes):
    """The best linear critic of this model, by least squares over its own distribution of boundaries."""
    returns = jax.vmap(lambda s: eq.discounted_returns(s.log_prob, DISCOUNT, s.continues))(outcomes)
    hidden = outcomes.hidden.reshape(-1, DIM)
    features = jnp.concatenate([hidden, jnp.ones((len(hidden), 1))], axis=1)
    solution = jnp.linalg.lstsq(features, returns.reshape(-1))[0]
    critic = eqx.tree_at(lambda c: (c.weight, c.bias), Critic(DIM), (solution[:-1], solution[-1]))
    _, plain = expected_policy_gradient(model, bytes, outcomes, objective(Discount(DISCOUNT)))
    _, criticised = expected_policy_gradient(model, bytes, outcomes, objective(Discount(DISCOUNT), critic))
    assert criticised < 0.5 * plain


def test_the_critic_descends_its_regression_and_touches_nothing_else():
    inputs = toy_signal()

    def loss(critic, hidden):
        seen = eqx.tree_at(lambda s: s.hidden, inputs, hidden)
        return objective(Discount(DISCOUNT), critic)(seen).loss

    by_critic, by_hidden = eqx.filter_grad(lambda both: loss(*both))((lively_critic(), inputs.hidden))
    assert not jnp.any(by_hidden)
    returns = eq.discounted_returns(inputs.log_prob, DISCOUNT, inputs.continues)
    error = jnp.where(inputs.mask, lively_critic().values(inputs) - returns, 0.0)
    expected = jnp.einsum("bn,bnd->d", 2 * error, inputs.hidden) / float(jnp.sum(inputs.mask))
    np.testing.assert_allclose(by_critic.weight, expected, rtol=1e-4, atol=1e-5)


def test_generalised_advantages_are_sums_of_temporal_differences():
    inputs = toy_signal()
    gae = eqx.tree_at(lambda g: g.critic, GeneralisedAdvantage(DIM, 0.9, 0.6), lively_critic())
    found = objective(gae).advantages(inputs)
    values = np.asarray(lively_critic().values(inputs))
    rewards = np.asarray(inputs.log_prob)
    for b in range(3):
        for i in range(7):
            expected = 0.0
            for k in range(i, 7):
                after = values[b, k + 1] if k + 1 < 7 else 0.0
                expected += (0.9 * 0.6) ** (k - i) * (rewards[b, k] + 0.9 * after - values[b, k])
            assert float(found[b, i]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_decay_of_one_is_a_discount_and_a_critic():
    inputs = toy_signal()
    gae = eqx.tree_at(lambda g: g.critic, GeneralisedAdvantage(DIM, 0.9, 1.0), lively_critic())
    one, two = objective(gae), objective(Discount(0.9), lively_critic())
    np.testing.assert_allclose(one.advantages(inputs), two.advantages(inputs), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one(inputs).loss, two(inputs).loss, rtol=1e-5)


def test_generalised_advantages_trade_bias_for_variance(model, bytes, outcomes):
    exact, high = expected_policy_gradient(model, bytes, outcomes, objective(GeneralisedAdvantage(DIM, 1.0, 1.0)))
    biased, low = expected_policy_gradient(model, bytes, outcomes, objective(GeneralisedAdvantage(DIM, 1.0, 0.5)))
    assert low < high
    assert not np.allclose(exact, biased, **CLOSE)


def test_samples_are_compared_with_the_other_draws_for_their_sequence():
    inputs = toy_signal(batch=6, samples=3)
    found = objective(Discount(DISCOUNT), SampleCentre()).advantages(inputs)
    returns = np.asarray(eq.discounted_returns(inputs.log_prob, DISCOUNT, inputs.continues))
    for row in range(6):
        group = 3 * (row // 3)
        others = [other for other in range(group, group + 3) if other != row]
        np.testing.assert_allclose(found[row, :-1], (returns[row] - returns[others].mean(0))[:-1], rtol=1e-4, atol=1e-5)


def test_comparing_samples_biases_nothing(model, bytes, outcomes):
    """Two draws for each of two sequences: the batch of `outcomes` holds both sequences, so its pairs are the draws."""
    count = len(joint_strings())
    half = int(count**0.5)
    # The strings of sequence 0 alone, then all pairs of them: two independent draws for one sequence.
    first = jax.tree.map(lambda leaf: leaf[::half, :1], outcomes)
    pairs = [(i, j) for i in range(half) for j in range(half)]
    left, right = (jnp.array([pair[side] for pair in pairs]) for side in (0, 1))
    doubled = jax.tree.map(lambda leaf: jnp.concatenate([leaf[left], leaf[right]], axis=1), first)
    doubled = jax.vmap(lambda inputs: dataclasses.replace(inputs, samples=2))(doubled)
    repeated = jnp.concatenate([bytes[:1], bytes[:1]])
    plain, noisy = expected_policy_gradient(model, repeated, doubled, objective(Discount(DISCOUNT)))
    centred, quiet = expected_policy_gradient(model, repeated, doubled, objective(Discount(DISCOUNT), SampleCentre()))
    np.testing.assert_allclose(centred, plain, **CLOSE)
    assert quiet < noisy


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match="2 or more"):
        objective(SampleCentre()).advantages(toy_signal())


def off_policy(inputs, behaviour):
    log_prob = eq.action_log_prob(behaviour, inputs.boundaries.actions)
    return eqx.tree_at(lambda s: s.boundaries.behaviour_log_prob, inputs, log_prob, is_leaf=lambda leaf: leaf is None)


def test_importance_weights_make_other_policies_draws_unbiased(model, bytes, outcomes):
    behaviour = jnp.broadcast_to(jnp.array([0.0, 0.4, -0.5, 0.2]), (BATCH, LENGTH))
    layout = plain_layout(bytes)
    hidden = model.stage.encoder(model.embed(layout), layout).hidden
    router = policy_of(model)
    seen = jax.vmap(lambda s: off_policy(s, behaviour))(outcomes)

    def expected(reduction):
        def one(inputs):
            def loss(weight):
                options = SamplingOptions(boundary_scan, actions=inputs.boundaries.actions, training=True)
                scored = eqx.tree_at(lambda r: r.weight, router, weight)(hidden, layout, options)
                scored = dataclasses.replace(scored, behaviour_log_prob=inputs.boundaries.behaviour_log_prob)
                changed = eqx.tree_at(lambda s: s.boundaries, inputs, scored)
                return objective(EarlyExit(), *reduction)(changed).metrics["policy_loss"]

            drawn = jnp.where(inputs.boundaries.decided, inputs.boundaries.behaviour_log_prob, 0.0)
            return jnp.exp(jnp.sum(drawn)) * jax.grad(loss)(router.weight)

        return jnp.sum(jax.jit(jax.vmap(one))(seen), axis=0)

    exact, _ = expected_policy_gradient(model, bytes, outcomes, objective(EarlyExit()))
    np.testing.assert_allclose(expected((ImportanceWeight(),)), exact, rtol=1e-3, atol=1e-5)
    baselines = (ImportanceWeight(), lively_critic(), BatchCentre(leave_one_out=True))
    np.testing.assert_allclose(expected(baselines), exact, rtol=1e-3, atol=1e-5)
    assert not np.allclose(expected(()), exact, rtol=1e-2, atol=1e-4)


def test_importance_weights_begin_anew_with_each_document():
    logits = jnp.zeros((1, 6))
    behaviour = jnp.full((1, 6), jnp.log(0.25))
    actions = jnp.ones((1, 6), bool)
    starts = jnp.array([[True, False, False, True, False, False]])
    weights = eq.importance_weights(logits, actions, behaviour, ~starts, starts)
    np.testing.assert_allclose(weights, [[1, 2, 4, 1, 2, 4]], rtol=1e-5)


def test_an_off_policy_router_draws_from_the_behaviour_only_in_training():
    layout = plain_layout(text_bytes(4, 200))
    hidden = jnp.zeros((4, 200, 3))
    router = OffPolicy(Bernoulli(0.1), Bernoulli(0.6))
    trained = router(hidden, layout, SamplingOptions(boundary_scan, jax.random.key(0), training=True))
    evaluated = router(hidden, layout, SamplingOptions(boundary_scan, jax.random.key(0)))
    assert 0.55 < float(jnp.mean(trained.actions)) < 0.65
    assert float(jnp.mean(evaluated.actions)) < 0.15
    np.testing.assert_allclose(trained.probs, 0.1, rtol=1e-6)
    expected = np.where(trained.actions, np.log(0.6), np.log(0.4))
    assert trained.behaviour_log_prob is not None
    np.testing.assert_allclose(trained.behaviour_log_prob, expected, rtol=1e-5)
    assert evaluated.behaviour_log_prob is None


@pytest.mark.parametrize(
    ("reductions", "what"),
    [
        ((Discount(), GeneralisedAdvantage(DIM)), "GeneralisedAdvantage"),
        ((Discount(), EarlyExit()), "EarlyExit"),
        ((Discount(), ImportanceWeight()), "ImportanceWeight"),
        ((Discount(), Discount()), "Discount"),
    ],
)
def test_an_order_without_sense_is_refused(reductions, what):
    with pytest.raises(ValueError, match=what):
        objective(*reductions).advantages(toy_signal())


def test_weights_without_a_behaviour_are_refused():
    with pytest.raises(ValueError, match="OffPolicy"):
        objective(ImportanceWeight()).advantages(toy_signal())
