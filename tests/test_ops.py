"""The ragged ops against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimators import equations as eq
from estimators.base import Limits
from unet.ops import boundary_scan, downsample, token_of, upsample
from unet.ops.boundary_scan import scan_in_turn, scan_parallel, scan_unrolled


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([1, 7, 12]), st.sampled_from([1, 5, 14]), st.floats(0, 1), st.integers(0, 10_000))
def test_downsample_keeps_the_first_rows_and_counts_the_rest(length, capacity, rate, seed):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(3, length, 2)).astype(np.float32)
    actions = rng.random((3, length)) < rate
    rows = jax.jit(downsample, static_argnums=2)(jnp.asarray(hidden), jnp.asarray(actions), capacity)
    for b in range(3):
        places = np.flatnonzero(actions[b])
        kept = places[:capacity]
        assert int(rows.lengths[b]) == len(kept)
        assert int(rows.overflow[b]) == len(places) - len(kept)
        np.testing.assert_array_equal(rows.positions[b, : len(kept)], kept)
        np.testing.assert_array_equal(rows.values[b, : len(kept)], hidden[b, kept])
        assert not np.any(rows.values[b, len(kept) :])


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([1, 7, 12]), st.sampled_from([1, 5, 14]), st.floats(0, 1), st.integers(0, 10_000))
def test_upsample_repeats_the_last_closed_token(length, capacity, rate, seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(3, capacity, 2)).astype(np.float32)
    actions = rng.random((3, length)) < rate
    got = jax.jit(upsample)(jnp.asarray(values), jnp.asarray(actions))
    number = jax.jit(token_of)(jnp.asarray(actions))
    for b in range(3):
        for i in range(length):
            token = int(actions[b, : i + 1].sum()) - 1
            assert int(number[b, i]) == token
            expected = np.zeros(2) if token < 0 else values[b, min(token, capacity - 1)]
            np.testing.assert_array_equal(got[b, i], expected)


def test_down_and_up_again_gives_each_byte_the_row_that_closed_its_token():
    hidden = jnp.arange(24, dtype=jnp.float32).reshape(1, 12, 2)
    actions = jnp.zeros((1, 12), bool).at[0, jnp.array([0, 4, 5, 9])].set(True)
    closed = np.array([0, 0, 0, 0, 4, 5, 5, 5, 5, 9, 9, 9])
    np.testing.assert_array_equal(upsample(downsample(hidden, actions, 4).values, actions)[0], hidden[0, closed])


def test_the_gradient_of_upsample_sums_over_the_bytes_of_a_token():
    actions = jnp.zeros((1, 6), bool).at[0, jnp.array([0, 2])].set(True)
    cotangent = jnp.arange(6, dtype=jnp.float32).reshape(1, 6, 1)
    gradient = jax.grad(lambda values: jnp.sum(upsample(values, actions) * cotangent))(jnp.zeros((1, 3, 1)))
    np.testing.assert_array_equal(gradient[0, :, 0], [1.0, 14.0, 0.0])


def test_downsample_refuses_an_empty_capacity():
    with pytest.raises(ValueError, match="at least 1"):
        downsample(jnp.zeros((1, 4, 2)), jnp.ones((1, 4), bool), 0)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("window", [0, 1, 3])
def test_boundary_scan_draws_in_order_from_the_logits_of_its_own_past(window, cap):
    rng = np.random.default_rng(3)
    projections = jnp.asarray(rng.normal(size=(4, 20, window + 1)) * 2, jnp.float32)
    uniforms = jnp.asarray(rng.random((4, 20)), jnp.float32)
    starts = jnp.zeros((4, 20), bool).at[:, 0].set(True).at[1, 7].set(True)
    drawn = jax.jit(boundary_scan, static_argnums=3)(projections, uniforms, starts, cap)
    memory = np.zeros((4, window), bool)
    for i in range(20):
        memory &= ~np.asarray(starts)[:, i, None]
        logits = projections[:, i, 0] + np.sum(np.where(memory, projections[:, i, 1:], 0), axis=1)
        logits = logits if cap is None else cap * np.tanh(logits / cap)
        action = (np.asarray(uniforms)[:, i] < 1 / (1 + np.exp(-logits))) | np.asarray(starts)[:, i]
        np.testing.assert_allclose(drawn.logits[:, i], logits, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(drawn.actions[:, i], action)
        memory = np.concatenate([action[:, None], memory], axis=1)[:, :window]
    parallel = eq.windowed_logits(projections, drawn.actions, starts)
    parallel = parallel if cap is None else eq.soft_cap(parallel, cap)
    np.testing.assert_allclose(drawn.logits, parallel, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("window", [1, 3, 7])
def test_all_positions_at_once_draw_bit_for_bit_what_one_after_another_draws(window, cap):
    def decide(logits, uniform, start):
        logits = eq.soft_cap(logits, cap)
        return (uniform < jax.nn.sigmoid(logits)) | start, logits

    rng = np.random.default_rng(window)
    projections = jnp.asarray(rng.normal(size=(3, 300, window + 1)) * 2, jnp.float32)
    # Greedy in the last sequence, which does not begin with a start, as in decoding.
    uniforms = jnp.asarray(rng.random((3, 300)), jnp.float32).at[2].set(0.5)
    starts = jnp.zeros((3, 300), bool).at[:2, 0].set(True).at[1, 7:150:9].set(True)
    wanted, *others = (
        jax.jit(functools.partial(scan, decide))(projections, uniforms, starts)
        for scan in (scan_in_turn, scan_parallel, scan_unrolled)
    )
    assert 0.1 < wanted[0].mean() < 0.9
    for found in others:
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_an_accelerator_without_the_kernel_scans_without_a_loop_or_in_a_short_one():
    def lowered(lags, limited=False):
        q, u = jax.ShapeDtypeStruct((2, 4096, lags), jnp.float32), jax.ShapeDtypeStruct((2, 4096), jnp.float32)

        def scan(q, u):
            limits = Limits(jnp.full(u.shape, 2), jnp.full(u.shape, 5)) if limited else None
            return boundary_scan(q, u, limits=limits, implementation="xla")

        return jax.jit(scan).trace(q, u).lower(lowering_platforms=("cuda",)).as_text()

    assert "while" not in lowered(8)
    for looped in (lowered(12), lowered(1, limited=True)):
        assert looped.count("stablehlo.while") == 1
        assert "dense<256> : tensor<i32>" in looped
        assert "dense<4096> : tensor<i32>" not in looped


def test_boundary_scan_draws_with_the_probability_it_states():
    projections = jnp.broadcast_to(jnp.array([eq.logit(0.3), 1.0]), (2000, 3, 2))
    uniforms = jax.random.uniform(jax.random.key(0), (2000, 3))
    actions = np.asarray(boundary_scan(projections, uniforms).actions)
    assert actions[:, 0].all()
    after_a_boundary = 1 / (1 + np.exp(-(eq.logit(0.3) + 1.0)))
    expected = after_a_boundary * after_a_boundary + (1 - after_a_boundary) * 0.3
    # Four standard errors of a share among 2000.
    assert abs(actions[:, 1].mean() - after_a_boundary) < 4 * np.sqrt(0.25 / 2000)
    assert abs(actions[:, 2].mean() - expected) < 4 * np.sqrt(0.25 / 2000)
