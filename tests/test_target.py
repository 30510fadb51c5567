"""The rate that is aimed at: the schedule, the controller, and who follows it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import RatioObjective, ScoreFunctionObjective, Uniform
from experiments.training.target import TargetSchedule, TargetState
from tests.conftest import losses, predict, small_model, small_score_function, text_bytes
from tests.test_reductions import toy_signal
from unet import Chunker, Distribute, Select


def asked_over(schedule, steps, rate):
    state, asked, aimed = TargetState(), [], []
    for _ in range(steps):
        asked.append(float(schedule.asked(state)))
        aimed.append(float(schedule.target(state)))
        state = schedule.moved(state, jnp.asarray(rate(aimed[-1])))
    return asked, aimed


def test_the_schedule_is_a_straight_line_and_then_level():
    asked, aimed = asked_over(TargetSchedule(0.8, 0.2, 4, 0.0), 7, lambda aimed: aimed)
    np.testing.assert_allclose(asked, [0.8, 0.65, 0.5, 0.35, 0.2, 0.2, 0.2], rtol=1e-5)
    assert aimed == asked


@pytest.mark.parametrize("excess", [1.4, 0.7])
def test_the_controller_brings_a_biased_estimator_to_the_rate(excess):
    """An estimator that always draws so many times as many boundaries as it aims at."""
    _, aimed = asked_over(TargetSchedule(0.2, 0.2, 1, 0.05), 300, lambda aimed: excess * aimed)
    assert excess * aimed[-1] == pytest.approx(0.2, rel=1e-3)


def test_without_control_the_target_stays():
    _, aimed = asked_over(TargetSchedule(0.2, 0.2, 1, 0.0), 50, lambda aimed: 0.9)
    np.testing.assert_allclose(aimed, 0.2, rtol=1e-6)


def test_uniform_boundaries_follow_the_target_at_once():
    model, bytes = small_model(Uniform(chunker=Chunker(Select(), Distribute()), target_rate=0.2)), text_bytes(2, 40)
    for rate in (0.2, 0.5):
        output = losses(model, bytes, key=jax.random.key(0), target_rate=jnp.asarray(rate))
        assert float(output.rate) == pytest.approx(rate, abs=1e-6)


@pytest.mark.parametrize("objective", [ScoreFunctionObjective((), 0.2), RatioObjective(0.2)], ids=["sfe", "ratio"])
def test_objectives_aim_at_the_rate_of_the_signal(objective):
    inputs = toy_signal()
    moved = dataclasses.replace(inputs, target_rate=jnp.asarray(0.4))
    same = dataclasses.replace(objective, target_rate=0.4)
    np.testing.assert_allclose(objective(moved).loss, same(inputs).loss, rtol=1e-5)
    assert float(objective(moved).loss) != float(objective(inputs).loss)


def test_several_samples_share_one_encoder_pass_and_differ_in_their_boundaries():
    model, bytes = small_model(small_score_function()), text_bytes(2, 24)
    prediction = predict(model, bytes, key=jax.random.key(0), samples=3, training=True)
    assert prediction.logits.shape == (6, 24, 256)
    level = prediction.levels[0]
    np.testing.assert_array_equal(level.hidden[0], level.hidden[2])
    np.testing.assert_array_equal(level.hidden[3], level.hidden[5])
    assert not np.array_equal(level.boundaries.actions[0], level.boundaries.actions[1])
    one = predict(model, bytes[:1], actions=(level.boundaries.actions[1:2],), training=True)
    np.testing.assert_allclose(prediction.logits[1], one.logits[0], rtol=1e-4, atol=1e-5)
    assert jnp.isfinite(losses(model, bytes, key=jax.random.key(0), samples=3).loss)
