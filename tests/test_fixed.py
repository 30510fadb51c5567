"""Boundary rules against what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import Draw, Stride, Uniform, equations
from estimators.fixed import EveryNth, UniformRouter, is_spacelike, is_whitespace, spacelike, whitespace
from unet import SelectDistribute
from unet.likelihood import plain_layout
from unet.ops import boundary_scan


def layout_of(text, segments=None, mask=None):
    return plain_layout(jnp.asarray([list(text)], jnp.int32), segments, mask)


def test_whitespace_is_ascii_white_space():
    everything = np.arange(256)
    expected = np.array([bytes([b]).isspace() for b in everything])
    np.testing.assert_array_equal(is_whitespace(jnp.asarray(everything)), expected)
    np.testing.assert_array_equal(whitespace(layout_of(b"a b\nc"))[0], [False, True, False, True, False])


def test_spacelike_is_neither_alphanumeric_nor_a_continuation_byte():
    everything = np.arange(256)
    expected = np.array([not (bytes([b]).isalnum() or 0x80 <= b <= 0xBF) for b in everything])
    np.testing.assert_array_equal(is_spacelike(jnp.asarray(everything)), expected)


def test_spacelike_boundaries_open_runs_only_and_stand_at_bos():
    got = spacelike(layout_of(b"\xfeab, c\xc3\xa9..d"))[0]
    #                         BOS   a      b      ,     ' '    c      é lead  é cont  .      .      d
    expected = [True, False, False, True, False, False, True, False, True, False, False]
    np.testing.assert_array_equal(got, expected)


def test_stride_counts_from_the_start_of_each_document():
    segments = jnp.asarray([[0] * 5 + [1] * 5])
    got = EveryNth(3)(layout_of(b"0123456789", segments))[0]
    np.testing.assert_array_equal(np.flatnonzero(got), [0, 3, 5, 8])
    with pytest.raises(ValueError, match="at least 1"):
        Stride(chunker=SelectDistribute(), stride=0)


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.38])
def test_uniform_draws_exactly_its_share_first_and_last_forced(rate):
    mask = jnp.ones((3, 50), bool).at[1, 33:].set(False)
    layout = plain_layout(jnp.zeros((3, 50), jnp.int32), mask=mask)
    hidden = jnp.zeros((3, 50, 1))
    boundaries = UniformRouter(rate)(hidden, layout, Draw(boundary_scan, jax.random.key(0)))
    valid = np.asarray(mask.sum(axis=1))
    np.testing.assert_array_equal(boundaries.actions.sum(axis=1), np.round(valid * np.float32(rate)))
    assert boundaries.actions[:, 0].all()
    assert all(boundaries.actions[b, valid[b] - 1] for b in range(3))
    other = UniformRouter(rate)(hidden, layout, Draw(boundary_scan, jax.random.key(1)))
    assert (boundaries.actions != other.actions).any()


def test_uniform_prefers_no_place():
    layout = plain_layout(jnp.zeros((400, 30), jnp.int32))
    drawn = UniformRouter(0.3)(jnp.zeros((400, 30, 1)), layout, Draw(boundary_scan, jax.random.key(0))).actions
    share = np.asarray(drawn)[:, 1:-1].mean(axis=0)
    # Seven free boundaries among 28 places, four standard errors.
    np.testing.assert_allclose(share, 7 / 28, atol=4 * np.sqrt(0.25 * 0.75 / 400))


def test_uniform_refuses_impossible_rates():
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        Uniform(chunker=SelectDistribute(), target_rate=1.0)
    assert equations.logit(0.5) == 0.0
