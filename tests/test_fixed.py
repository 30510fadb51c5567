"""Boundary rules against what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import Characters, SamplingOptions, Stride, Thinned, Uniform, UniformRouter, equations
from estimators.routers.rules import (
    EveryNth,
    RuleRouter,
    character_first,
    character_last,
    character_size,
    is_spacelike,
    is_whitespace,
    spacelike,
    whitespace,
)
from unet import Chunker, Distribute, Select
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
    with pytest.raises(ValueError, match="stride must be a whole number from 1"):
        Stride(chunker=Chunker(Select(), Distribute()), stride=0)


def test_the_first_byte_of_a_character_tells_its_size():
    opening = [*range(0x80), *range(0xC2, 0xF5)]
    sizes = character_size(jnp.asarray(opening))
    for first, size in zip(opening, sizes.tolist(), strict=True):
        # The smallest second byte that can stand there, the others likewise.
        second = {0xE0: 0xA0, 0xF0: 0x90}.get(first, 0x80)
        assert len(bytes([first, second, 0x80, 0x80][:size]).decode()) == 1
    assert not character_size(jnp.arange(0x80, 0xC0)).any()
    assert (character_size(jnp.asarray([254, 255])) == 1).all()


def test_characters_open_and_close_where_utf8_says():
    text = b"\xfe" + "aé字😀\n。".encode()
    #                BOS a  é     字        😀          \n 。
    first = [True, True, True, False, True, False, False, True, False, False, False, True, True, False, False]
    last = [True, True, False, True, False, False, True, False, False, False, True, True, False, False, True]
    np.testing.assert_array_equal(character_first(layout_of(text))[0], first)
    np.testing.assert_array_equal(character_last(layout_of(text))[0], last)


def test_a_character_that_is_cut_off_is_not_closed():
    zi = "字".encode()
    np.testing.assert_array_equal(np.flatnonzero(character_last(layout_of(zi[1:] + zi))[0]), [4])
    np.testing.assert_array_equal(np.flatnonzero(character_last(layout_of(zi[:2] + zi))[0]), [4])
    np.testing.assert_array_equal(np.flatnonzero(character_last(layout_of(zi + zi[1:2] + b"a"))[0]), [2, 4])
    np.testing.assert_array_equal(np.flatnonzero(character_last(layout_of(zi[:1]))[0]), [])
    # The first byte belongs to another document.
    segments = jnp.asarray([[0, 1, 1, 1]])
    np.testing.assert_array_equal(np.flatnonzero(character_last(layout_of(zi + b"a", segments))[0]), [3])


@pytest.mark.parametrize(("at", "expected"), [("last", [0, 4, 8, 10, 16]), ("first", [0, 2, 8, 10, 14])])
def test_every_second_character_is_counted_from_the_start_of_its_document(at, expected):
    text = b"\xfe" + "a一二bc".encode() + b"\xfe" + "三四五".encode()
    segments = jnp.asarray([[0] * 10 + [1] * 10])
    router = Characters(chunker=Chunker(Select(), Distribute()), every=2, at=at).router
    got = router(jnp.zeros((1, 20, 1)), layout_of(text, segments), SamplingOptions(boundary_scan)).actions[0]
    np.testing.assert_array_equal(np.flatnonzero(got), expected)


def test_characters_refuse_to_take_none():
    with pytest.raises(ValueError, match="every must be a whole number from 1 to 2147483647; got 0"):
        Characters(chunker=Chunker(Select(), Distribute()), every=0)
    assert Thinned(RuleRouter(EveryNth(3), 0, 1 / 3), 2).rate == pytest.approx(1 / 6)
    assert Characters(chunker=Chunker(Select(), Distribute())).router.rate is None


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.38])
def test_uniform_draws_exactly_its_share_first_and_last_forced(rate):
    mask = jnp.ones((3, 50), bool).at[1, 33:].set(False)
    layout = plain_layout(jnp.zeros((3, 50), jnp.int32), mask=mask)
    hidden = jnp.zeros((3, 50, 1))
    boundaries = UniformRouter(rate)(hidden, layout, SamplingOptions(boundary_scan, jax.random.key(0)))
    valid = np.asarray(mask.sum(axis=1))
    np.testing.assert_array_equal(boundaries.actions.sum(axis=1), np.round(valid * np.float32(rate)))
    assert boundaries.actions[:, 0].all()
    assert all(boundaries.actions[b, valid[b] - 1] for b in range(3))
    other = UniformRouter(rate)(hidden, layout, SamplingOptions(boundary_scan, jax.random.key(1)))
    assert (boundaries.actions != other.actions).any()


def test_uniform_prefers_no_place():
    layout = plain_layout(jnp.zeros((400, 30), jnp.int32))
    drawn = UniformRouter(0.3)(
        jnp.zeros((400, 30, 1)), layout, SamplingOptions(boundary_scan, jax.random.key(0))
    ).actions
    share = np.asarray(drawn)[:, 1:-1].mean(axis=0)
    # Seven free boundaries among 28 places, four standard errors.
    np.testing.assert_allclose(share, 7 / 28, atol=4 * np.sqrt(0.25 * 0.75 / 400))


def test_uniform_refuses_impossible_rates():
    with pytest.raises(ValueError, match=r"target_rate must be a number from 1e-06 to 0\.999999; got 1\.0"):
        Uniform(chunker=Chunker(Select(), Distribute()), target_rate=1.0)
    assert equations.logit(0.5) == 0.0
