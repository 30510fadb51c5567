"""The laboratory against itself: unbiased estimators come out unbiased, sampling agrees with enumeration."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import equations as eq
from experiments import lab
from experiments.config import transformer_shape
from experiments.laboratory.moments import (
    credit,
    disarm_moments,
    exact_gradient,
    off_policy_moments,
    relaxed_moments,
    sample_moments,
    score_moments,
    string_probs,
)
from experiments.laboratory.scale import noise
from experiments.laboratory.subjects import Tables
from experiments.presets import PRESETS
from tests.test_run import corpus as corpus

TEXTS, DECISIONS = 3, 4
STRINGS = jnp.asarray([[True, *rest] for rest in itertools.product([False, True], repeat=DECISIONS)])
CLOSE = {"rtol": 2e-4, "atol": 2e-6}


@pytest.fixture(scope="module")
def logits():
    return jax.random.normal(jax.random.key(0), (TEXTS, DECISIONS))


@pytest.fixture(scope="module")
def tables():
    """Likelihoods that depend on the past actions only, as a causal model's do."""
    keys = jax.random.split(jax.random.key(1), 4)
    count = len(STRINGS)
    noise = jax.random.normal(keys[0], (TEXTS, DECISIONS, count))
    number = jnp.cumsum(jnp.where(STRINGS, 2 ** jnp.arange(DECISIONS + 1), 0), axis=1)
    log_lik = jnp.stack([noise[:, i][:, number[:, i] % count] for i in range(DECISIONS)], axis=-1)
    return Tables(
        log_lik,
        jax.random.normal(keys[1], (TEXTS, DECISIONS)),
        jax.random.normal(keys[2], (TEXTS, DECISIONS, 3)),
        jax.random.normal(keys[3], (TEXTS, count, DECISIONS)),
        jnp.zeros((TEXTS, count, DECISIONS)),
    )


def test_unbiased_estimators_have_the_exact_gradient(logits, tables):
    exact = exact_gradient(logits, tables, STRINGS)
    early = tables.log_lik - tables.early_log_lik[:, None]
    returns = credit(early, 1.0)
    baseline = jax.random.normal(jax.random.key(5), (TEXTS, DECISIONS))
    for moments in (
        score_moments(logits, STRINGS, credit(tables.log_lik, 1.0)),
        score_moments(logits, STRINGS, returns),
        score_moments(logits, STRINGS, returns, baseline=baseline),
        score_moments(logits, STRINGS, returns, centring="leave-one-out"),
        sample_moments(logits, STRINGS, returns, 3),
        off_policy_moments(logits, 0.5 * logits, STRINGS, early, 1.0),
        disarm_moments(logits, STRINGS, tables),
    ):
        np.testing.assert_allclose(moments.mean, exact, **CLOSE)
    batch = score_moments(logits, STRINGS, returns, centring="batch")
    np.testing.assert_allclose(batch.mean, exact * (TEXTS - 1) / TEXTS, **CLOSE)


def test_probabilities_of_strings_sum_to_one(logits):
    np.testing.assert_allclose(jnp.sum(string_probs(logits, STRINGS), axis=1), 1.0, rtol=1e-5)


def place_of(actions):
    """The place of a string among all."""
    return jnp.sum(jnp.where(actions, 2 ** jnp.arange(DECISIONS - 1, -1, -1), 0), axis=-1)


def drawn(logits, key, count):
    """Strings drawn by sampling, as indices."""
    actions = jax.random.uniform(key, (count, *logits.shape)) < jax.nn.sigmoid(logits)
    return actions.astype(jnp.float32), place_of(actions)


def variance_of(samples):
    return float(jnp.sum(jnp.var(samples, axis=0)))


@pytest.mark.parametrize("centring", ["none", "leave-one-out", "batch"])
def test_exact_variances_are_those_of_samples(logits, tables, centring):
    returns = credit(tables.log_lik, 0.9)
    actions, index = drawn(logits, jax.random.key(2), 40_000)
    chosen = jnp.take_along_axis(returns[None], index[..., None, None], axis=2)[:, :, 0]
    if centring != "none":
        chosen = jax.vmap(lambda r: eq.batch_centred(r, None, centring == "leave-one-out"))(chosen)
    samples = -(actions - jax.nn.sigmoid(logits)) * chosen / DECISIONS
    exact = score_moments(logits, STRINGS, returns, centring=centring)
    assert variance_of(samples) == pytest.approx(float(exact.variance), rel=0.05)


@pytest.mark.parametrize("count", [2, 4])
def test_the_variance_of_several_samples_is_that_of_samples(logits, tables, count):
    returns = credit(tables.log_lik, 1.0)
    actions, index = drawn(logits, jax.random.key(3), 40_000)
    chosen = jnp.take_along_axis(returns[None], index[..., None, None], axis=2)[:, :, 0]
    score = actions - jax.nn.sigmoid(logits)
    grouped, scores = (part.reshape(-1, count, TEXTS, DECISIONS) for part in (chosen, score))
    others = (jnp.sum(grouped, axis=1, keepdims=True) - grouped) / (count - 1)
    samples = -jnp.mean(scores * (grouped - others), axis=1) / DECISIONS
    assert variance_of(samples) == pytest.approx(
        float(sample_moments(logits, STRINGS, returns, count).variance), rel=0.05
    )


def test_relaxed_moments_are_those_of_samples(logits, tables):
    """Noise drawn, the slope of the relaxed draw by automatic differentiation."""
    uniforms = jax.random.uniform(jax.random.key(4), (40_000, *logits.shape))

    def soft(logits, uniforms):
        return eq.gumbel_sigmoid(logits, uniforms, 0.5)

    slope = jax.vmap(jax.grad(lambda row, noise: jnp.sum(soft(row, noise))), (None, 0))(logits, uniforms)
    actions = jax.vmap(lambda u: soft(logits, u) > 0.5)(uniforms)
    index = place_of(actions)
    chosen = jnp.take_along_axis(tables.by_actions[None], index[..., None, None], axis=2)[:, :, 0]
    samples = -chosen * slope / DECISIONS
    exact = relaxed_moments(logits, STRINGS, tables, 0.5)
    np.testing.assert_allclose(jnp.mean(samples, axis=0), exact.mean, atol=5e-3)
    assert variance_of(samples) == pytest.approx(float(exact.variance), rel=0.05)


def test_the_command_leaves_a_table_and_a_figure(corpus, tmp_path):
    pytest.importorskip("diffrax")
    out = tmp_path / "lab"
    arguments = (
        *(
            "--dataset",
            corpus,
            "--out",
            out,
            "--length",
            "4",
            "--texts",
            "2",
            "--steps",
            "3",
            "--time",
            "20",
            "--draws",
            "8",
        ),
        *("--learning-rates", "--after"),
    )
    with jax.numpy_dtype_promotion("standard"):
        assert lab.main([str(argument) for argument in arguments]) == 0
    found = json.loads((out / "lab.json").read_text())
    by_name = {one["name"]: one for one in found["gradients"]}
    for name in ("score function: nothing", "score function: early exit", "DisARM"):
        assert by_name[name]["bias"] < 1e-3
    flows = {(one["model"], one["name"]): one for one in found["flows"]}
    exact, score = flows["distribute", "exact gradient"], flows["distribute", "score function, γ = 1"]
    assert score["end"] == pytest.approx(exact["end"], rel=1e-4)
    assert exact["end"] < exact["start"]
    assert (out / "lab.png").read_bytes().startswith(b"\x89PNG")
    assert lab.main([str(argument) for argument in arguments]) == 2


def test_noise_carries_a_flow_about_and_no_noise_leaves_it(logits, tables):
    pytest.importorskip("diffrax")
    from experiments.laboratory.flow import landscape, wander

    ground, returns = landscape(tables, STRINGS), credit(tables.log_lik, 1.0)

    def moments(scale):
        def scaled(logits):
            exact = score_moments(logits, STRINGS, returns)
            return dataclasses.replace(exact, covariance=scale * exact.covariance)

        return scaled

    with jax.numpy_dtype_promotion("standard"):
        still, moved, again = (
            wander("one", moments(scale), ground, logits, 4.0, 0.5, jax.random.key(0)) for scale in (0.0, 1.0, 1.0)
        )
    assert moved.losses == again.losses
    assert moved.start == still.start
    assert abs(moved.end - still.end) > 1e-3
    assert still.end < still.start


def test_noise_is_counted_relative_to_the_papers_estimator():
    tiny = PRESETS["tiny"]
    unet = dataclasses.replace(transformer_shape(tiny), dim=16, heads=2, main_layers=1, window=4)
    small = dataclasses.replace(tiny, unet=unet, length=32, batch=4)
    with jax.numpy_dtype_promotion("standard"):
        found = {one.name: one for one in noise(small, steps=1, draws=8, key=jax.random.key(0))}
    assert found["early exit, γ = .99, batch centring (the paper)"].variance == 1.0
    assert found["γ = .8"].variance < 1.0 < found["none of the three"].variance


@pytest.mark.parametrize(
    "arguments",
    [("--length", "13"), ("--texts", "1"), ("--draws", "9"), ("--time", "0"), ("--after", "-1")],
    ids=lambda a: a[0],
)
def test_impossible_settings_are_refused(tmp_path, arguments):
    assert lab.main(["--out", str(tmp_path / "out"), *arguments]) == 2
    assert not (tmp_path / "out").exists()
