"""Dynamic chunking against plain loops and closed forms; `test_reference.py` has it against the released program."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from estimators import Boundaries, CosineRouter, DynamicChunking, MLPRouter, SamplingOptions
from estimators import equations as eq
from tests.conftest import small_model, text_bytes
from unet import Chunker, Projection, Select, Smooth
from unet.likelihood import plain_layout
from unet.ops import boundary_scan, smooth

VALUES = {"rtol": 1e-4, "atol": 1e-4}


def test_the_ratio_loss_in_closed_form():
    actions = jnp.array([[True, False, False, True, False]])
    probs = jnp.array([[1.0, 0.2, 0.4, 0.6, 0.3]])
    share, mean, n = 0.4, 0.5, 4.0
    expected = n / (n - 1) * ((n - 1) * share * mean + (1 - share) * (1 - mean))
    assert float(eq.ratio_loss(actions, probs, n)) == pytest.approx(expected, rel=1e-6)
    fifth = jnp.arange(10)[None] % 5 == 0
    assert float(eq.ratio_loss(fifth, jnp.full((1, 10), 0.2), 5.0)) == pytest.approx(1.0, rel=1e-6)
    masked = eq.ratio_loss(actions, probs, n, jnp.array([[True, True, False, False, False]]))
    share, mean = 0.5, 0.6
    assert float(masked) == pytest.approx(n / (n - 1) * ((n - 1) * share * mean + (1 - share) * (1 - mean)), rel=1e-6)


def test_smoothing_equals_its_recurrence_and_forgets_at_starts():
    values = jax.random.normal(jax.random.key(0), (2, 7, 3))
    probs = jax.random.uniform(jax.random.key(1), (2, 7)).at[0, 3].set(0.0).at[1, 4].set(1.0)
    starts = jnp.zeros((2, 7), bool).at[:, 0].set(True).at[0, 5].set(True)
    found, alone = smooth(values, probs, starts), smooth(values, probs)
    for given, begin in ((found, starts), (alone, None)):
        memory = np.zeros((2, 3))
        for m in range(7):
            p = np.clip(np.asarray(probs)[:, m, None], 1e-4, 1 - 1e-4)
            kept = memory if begin is None else np.where(np.asarray(begin)[:, m, None], 0.0, memory)
            memory = p * np.asarray(values)[:, m] + (1 - p) * kept
            np.testing.assert_allclose(given[:, m], memory, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_smoothing_equals_finite_differences():
    values = jax.random.normal(jax.random.key(0), (1, 5, 2))
    probs = jax.random.uniform(jax.random.key(1), (1, 5), minval=0.2, maxval=0.8)

    def energy(values, probs):
        return jnp.sum(smooth(jnp.asarray(values), jnp.asarray(probs)) ** 2)

    check_grads(energy, (values, probs), order=1, modes=["rev"], rtol=1e-2)


def test_routing_starts_from_plain_cosines():
    hidden = jax.random.normal(jax.random.key(0), (2, 6, 8))
    boundaries = CosineRouter(8)(hidden, plain_layout(text_bytes(2, 6)), SamplingOptions(boundary_scan))
    unit = np.asarray(hidden) / np.linalg.norm(hidden, axis=-1, keepdims=True)
    expected = 0.5 * (1 - np.sum(unit[:, :-1] * unit[:, 1:], axis=-1))
    np.testing.assert_allclose(boundaries.probs[:, 1:], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(boundaries.probs[:, 0], 1.0)
    np.testing.assert_array_equal(boundaries.actions[:, 1:], expected > 0.5)


def test_a_zero_row_has_a_finite_gradient():
    hidden = jnp.zeros((1, 4, 3))
    gradient = jax.grad(lambda h: jnp.sum(eq.routing_probability(h, h)))(hidden)
    assert jnp.all(jnp.isfinite(gradient))


@pytest.fixture(scope="module")
def inputs():
    """Token outputs, their rows and boundaries, for a chunker to bring back."""
    hidden = jax.random.normal(jax.random.key(0), (2, 12, 4))
    layout = plain_layout(text_bytes(2, 12))
    boundaries = CosineRouter(4)(hidden, layout, SamplingOptions(boundary_scan))
    rows = Select()(hidden, boundaries, capacity=12).tokens
    return jax.random.normal(jax.random.key(1), rows.values.shape), rows, hidden, boundaries


def test_weighting_changes_gradients_or_values_as_it_says(inputs):
    outputs, rows, hidden, boundaries = inputs

    def up(weighting, probs):
        changed = dataclasses.replace(boundaries, probs=probs)
        return Smooth(weighting=weighting, smoothing=False)(outputs, rows, hidden, changed).hidden

    through, plain = (up(weighting, boundaries.probs) for weighting in ("straight-through", "none"))
    np.testing.assert_allclose(through, plain, rtol=1e-6)
    weighted = up("confidence", boundaries.probs)
    sure = eq.confidence(boundaries.probs, boundaries.actions)[..., None]
    np.testing.assert_allclose(weighted - hidden, (plain - hidden) * sure, rtol=1e-5, atol=1e-6)

    def gradient(weighting):
        return jax.grad(lambda probs: jnp.sum(up(weighting, probs) ** 2))(boundaries.probs)

    assert not jnp.any(gradient("none"))
    # The confidence enters both times, but its own value multiplies only one of the gradients.
    expected = jnp.sum(2 * plain * (plain - hidden), axis=-1) * jnp.where(boundaries.actions, 1.0, -1.0)
    # A forced boundary is certain, and no choice of the router's.
    expected = jnp.where(boundaries.starts, 0.0, expected)
    np.testing.assert_allclose(gradient("straight-through"), expected, rtol=1e-4, atol=1e-5)


def test_a_projected_residual_starts_from_nothing(inputs):
    outputs, rows, hidden, boundaries = inputs
    plain = Smooth()(outputs, rows, hidden, boundaries).hidden
    projected = Smooth(Projection(4))(outputs, rows, hidden, boundaries).hidden
    np.testing.assert_allclose(projected, plain - hidden, rtol=1e-5, atol=1e-6)


def test_a_projected_residual_is_summed_in_float32(inputs):
    outputs, rows, hidden, boundaries = inputs
    projection = eqx.tree_at(lambda p: p.weight, Projection(4, key=jax.random.key(0)), 3.0 + jnp.eye(4))
    half = hidden.astype(jnp.bfloat16)
    back = Smooth(Projection(4))(outputs.astype(jnp.bfloat16), rows, half, boundaries).hidden
    assert back.dtype == jnp.bfloat16
    joined = Smooth(projection).combined(back, half, boundaries)
    wanted = back.astype(jnp.float32) + projection(half.astype(jnp.float32))
    assert joined.dtype == jnp.bfloat16
    np.testing.assert_array_equal(joined, wanted.astype(jnp.bfloat16))


def test_a_forced_boundary_is_certain_whatever_the_policy_thought_of_it():
    hidden = jax.random.normal(jax.random.key(0), (1, 4, 4))
    actions, starts = jnp.asarray([[True, False, True, False]]), jnp.asarray([[True, False, False, False]])
    drawn = Boundaries(actions, jnp.zeros((1, 4)), jnp.full((1, 4), 0.2), ~starts, starts)
    tokens = Select()(hidden, drawn, capacity=2).tokens
    got = Smooth(weighting="confidence")(tokens.values, tokens, hidden, drawn).hidden
    np.testing.assert_allclose(got[0, 0], 2 * hidden[0, 0], rtol=1e-3)
    np.testing.assert_allclose(drawn.confidence[0], [1.0, 0.8, 0.2, 0.8], rtol=1e-6)


@pytest.mark.parametrize(
    ("chunker", "router"),
    [
        (Chunker(Select(), Smooth()), None),
        (Chunker(Select(), Smooth(smoothing=False)), None),
        (Chunker(Select(), Smooth(weighting="confidence")), None),
        (Chunker(Select(), Smooth()), MLPRouter(16, target_rate=0.5, key=jax.random.key(0))),
    ],
    ids=["published", "no smoothing", "no straight-through", "direct"],
)
def test_every_ablation_still_trains_its_router(chunker, router):
    estimator = DynamicChunking(16, chunker=chunker, target_rate=0.3, router=router)
    model = small_model(estimator)
    bytes = text_bytes(2, 16)
    gradients = eqx.filter_jit(eqx.filter_grad(lambda m: m.loss(bytes, key=jax.random.key(0)).loss))(model)
    for leaf in jax.tree.leaves(gradients.stage.estimator.router):
        assert jnp.any(leaf)


def test_boundaries_carry_the_confidence_of_what_was_done():
    actions, probs = jnp.array([[True, False]]), jnp.array([[0.9, 0.3]])
    boundaries = Boundaries(actions, probs, probs, actions, jnp.zeros_like(actions))
    np.testing.assert_allclose(boundaries.confidence, [[0.9, 0.7]], rtol=1e-6)
