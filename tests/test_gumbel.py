"""Straight-through Gumbel against the program of Nawrot et al., and its pooling against plain loops."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import Boundaries, MLPRouter, SamplingOptions
from estimators import equations as eq
from tests.conftest import text_bytes
from unet import Chunker, Distribute, MeanPool
from unet.likelihood import plain_layout
from unet.ops import boundary_scan, mean_pool

VALUES = {"rtol": 1e-5, "atol": 1e-6}
GRADIENTS = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def z(golden):
    return golden("dynamic_pooling")


@pytest.fixture(scope="module")
def parts(z):
    """The router and the chunker with the golden parameters."""
    router = MLPRouter(16, 32, temperature=float(z["temperature"]), key=jax.random.key(0))
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    first, first_bias, second, second_bias = (jnp.asarray(z[f"param.boundary_predictor.{name}"]) for name in names)
    router = eqx.tree_at(
        lambda r: (r.weight_in, r.bias_in, r.weight_out, r.bias_out),
        router,
        (first, first_bias, second[0], second_bias[0]),
    )
    pool = eqx.tree_at(lambda c: c.null, MeanPool(16, key=jax.random.key(0)), jnp.asarray(z["null_group"][0, 0]))
    return router, Chunker(pool, Distribute())


class Drawn(NamedTuple):
    soft: jax.Array
    hard: jax.Array
    boundaries: Boundaries


def draw_with(router, hidden, uniforms):
    """Boundaries from given noise; no row is forced, as in the golden program."""
    logits = router.logits(hidden)
    soft = eq.gumbel_sigmoid(logits, uniforms, router.temperature)
    actions = soft > 0.5
    none = jnp.zeros_like(actions)
    hard = eq.straight_through(actions, soft)
    return Drawn(soft, hard, Boundaries(actions, logits, jax.nn.sigmoid(logits), ~none, none, hard))


def up(chunker, rows, hidden, boundaries):
    """What positions get from the tokens alone. In the golden program those before the first boundary get the null group, here
    as the last token before them."""
    null = jnp.broadcast_to(chunker.downsampler.null, (hidden.shape[0], 1, hidden.shape[2]))
    return chunker.up(rows.values, rows, jnp.zeros_like(hidden), boundaries, state=null).hidden


def test_values_are_those_of_the_original(z, parts):
    router, chunker = parts
    hidden = jnp.swapaxes(jnp.asarray(z["hidden"]), 0, 1)
    soft, hard, boundaries = draw_with(router, hidden, jnp.asarray(z["uniforms"]))
    np.testing.assert_allclose(boundaries.logits, z["boundary_logits"], **VALUES)
    np.testing.assert_allclose(soft, z["soft"], **VALUES)
    np.testing.assert_array_equal(boundaries.relaxed, z["hard"])
    capacity = z["shortened"].shape[0] - 1
    rows = chunker.down(hidden, boundaries, capacity=capacity).tokens
    expected = np.swapaxes(z["shortened"], 0, 1)[:, 1:]
    np.testing.assert_allclose(rows.values, np.where(rows.mask[..., None], expected, 0.0), **VALUES)
    pooled = up(chunker, rows, hidden, boundaries)
    np.testing.assert_allclose(pooled, np.swapaxes(z["upsampled"], 0, 1), **VALUES)
    prior = eq.binomial_prior_loss(hard, float(z["prior"]))
    np.testing.assert_allclose(prior, z["prior_loss"], rtol=1e-5)


def test_gradients_are_those_of_the_original(z, parts):
    router, chunker = parts
    cotangent = jnp.swapaxes(jnp.asarray(z["cotangent"]), 0, 1)
    hidden = jnp.swapaxes(jnp.asarray(z["hidden"]), 0, 1)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(inputs):
        router, chunker, hidden = inputs
        _, hard, boundaries = draw_with(router, hidden, jnp.asarray(z["uniforms"]))
        rows = chunker.down(hidden, boundaries, capacity=z["shortened"].shape[0] - 1).tokens
        pooled = up(chunker, rows, hidden, boundaries)
        return jnp.sum(pooled * cotangent) + eq.binomial_prior_loss(hard, float(z["prior"]))

    by_router, by_chunker, by_hidden = gradient((router, chunker, hidden))
    np.testing.assert_allclose(by_hidden, np.swapaxes(z["grad_hidden"], 0, 1), **GRADIENTS)
    np.testing.assert_allclose(by_chunker.downsampler.null, z["grad_null_group"][0, 0], **GRADIENTS)
    for name, found in (
        ("0.weight", by_router.weight_in),
        ("0.bias", by_router.bias_in),
        ("2.weight", by_router.weight_out[None]),
        ("2.bias", by_router.bias_out[None]),
    ):
        np.testing.assert_allclose(found, z[f"grad.boundary_predictor.{name}"], err_msg=name, **GRADIENTS)


def test_groups_are_means_from_one_boundary_to_the_next():
    hidden = jax.random.normal(jax.random.key(0), (2, 9, 3))
    actions = jnp.array([[1, 0, 0, 1, 1, 0, 0, 0, 1], [1, 0, 0, 0, 1, 1, 0, 0, 0]], bool)
    starts = jnp.zeros((2, 9), bool).at[:, 0].set(True).at[1, 4].set(True)
    rows = mean_pool(hidden, actions, 5, starts=starts)
    # The start closes an empty group and counts among the one after it; what no boundary closes is in none.
    groups = [[[], [0, 1, 2, 3], [4], [5, 6, 7, 8]], [[], [], [4, 5]]]
    for b, row in enumerate(groups):
        for m, members in enumerate(row):
            expected = np.asarray(hidden)[b, members].mean(0) if members else np.zeros(3)
            np.testing.assert_allclose(rows.values[b, m], expected, rtol=1e-5, atol=1e-6, err_msg=f"{b} {m}")
        assert rows.lengths[b] == len(row)
        assert not np.any(rows.values[b, len(row) :])


def test_too_few_rows_leave_the_groups_there_are_as_they_were():
    hidden = jax.random.normal(jax.random.key(0), (1, 12, 3))
    actions = jnp.arange(12)[None] % 3 == 2
    whole, tight = mean_pool(hidden, actions, 4), mean_pool(hidden, actions, 2)
    np.testing.assert_array_equal(whole.values[:, :2], tight.values)
    assert tight.overflow[0] == 2


def test_draws_have_the_probability_of_their_logits():
    layout = plain_layout(text_bytes(64, 40))
    router = MLPRouter(4, target_rate=0.3, key=jax.random.key(1))
    hidden = jax.random.normal(jax.random.key(2), (64, 40, 4)) * 4
    boundaries = router(hidden, layout, SamplingOptions(boundary_scan, jax.random.key(3)))
    drawn, expected = boundaries.actions[:, 1:], boundaries.probs[:, 1:]
    error = float(jnp.mean(drawn) - jnp.mean(expected))
    assert abs(error) < 4 * float(jnp.sqrt(jnp.mean(expected * (1 - expected)) / drawn.size))
    np.testing.assert_array_equal(boundaries.relaxed, boundaries.actions)


def test_the_prior_is_least_at_its_own_count():
    def loss(count):
        return float(eq.binomial_prior_loss(jnp.zeros((1, 100)).at[0, :count].set(1.0), 0.2))

    assert min(range(0, 101, 5), key=loss) == 20
    masked = eq.binomial_prior_loss(jnp.ones((1, 100)), 0.2, jnp.arange(100)[None] < 10)
    assert float(masked) == pytest.approx(-np.log(0.2), rel=1e-5)
