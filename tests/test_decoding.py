"""Texts decoded in pieces of any size have the logits and boundaries of one call on the whole text.

That every registered estimator does so is part of its contract (test_contract.py); here are chunkers, settings and caches.
"""

import dataclasses
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import Boundaries, EveryNth, NoObjective, RuleRouter, WindowedPolicy
from estimators.base import Estimator, Layout
from estimators.decode_state import update_state
from tests.compositions import LENGTH, SHAPE, config_of, lively, registered
from tests.conftest import text_bytes
from unet import (
    AttentionPool,
    AveragePool,
    Chunker,
    Deviation,
    Distribute,
    Flat,
    Hierarchy,
    MaxPool,
    MeanPool,
    Projection,
    Select,
    Smooth,
    Widened,
    WithBoundary,
)
from unet.blocks import PreNorm, Stack, transformer
from unet.decoding.kv_cache import (
    KVCache,
    KVUpdate,
    cache_bytes,
    filled_quarters,
    is_unallocated,
    rounded_up,
    with_room,
)
from unet.mamba import Mamba2

BOUNDED = {"rtol": 1e-4, "atol": 1e-4}
LENGTHS = (1, 7, LENGTH - 1, 16)
KEYS = jax.random.split(jax.random.key(8), len(LENGTHS))


@eqx.filter_jit
def whole(model, bytes, keys):
    return model(bytes, key=keys)


@eqx.filter_jit
def decode(model, bytes, state, lengths):
    """The next `lengths` bytes of each text: what is predicted, and the state after them."""
    decoded = model.decode(bytes, state, mask=jnp.arange(bytes.shape[1]) < lengths[:, None])
    return decoded.prediction, update_state(state, decoded.update, lengths)


def prefill(model, bytes, lengths, keys):
    return decode(model, bytes, model.init_state(len(lengths), keys), jnp.asarray(lengths))


PIECES = (LENGTH, 5, 1)
"""A first piece, one of a few bytes, and byte by byte."""
BY_BYTE = (LENGTH, 1)
"""The same without a piece of a few bytes, which is a program fewer: generation goes byte by byte."""


def check_in_pieces(model, lengths=LENGTHS, keys=KEYS, room=LENGTH, bytes=None, pieces=PIECES):
    """Every prediction and every boundary, of texts decoded in `pieces`, the last of them again and again, each text going on by
    as much as a die says."""
    bytes = text_bytes(len(lengths), LENGTH, seed=4) if bytes is None else bytes
    expected, dice = whole(model, bytes, keys), np.random.default_rng(0)
    done, every = np.zeros(len(lengths), int), np.arange(len(lengths))[:, None]
    state = model.init_state(len(lengths), keys)
    for width in itertools.chain(pieces, itertools.repeat(pieces[-1])):
        if (done == LENGTH).all():
            break
        some = np.asarray(lengths) if width == LENGTH else dice.integers(0, width + 1, len(done))
        some = np.minimum(some, LENGTH - done)
        place = np.minimum(done[:, None] + np.arange(width), LENGTH - 1)
        prediction, state = decode(model, bytes[every, place], state, jnp.asarray(some))
        state = with_room(state, room) if width == LENGTH else state
        there = np.arange(width) < some[:, None]
        np.testing.assert_allclose(prediction.logits[there], expected.logits[every, place][there], **BOUNDED)
        for got, level in zip(prediction.levels[:1], expected.levels[:1], strict=True):
            actions = got.boundaries.actions
            np.testing.assert_array_equal(actions[there], level.boundaries.actions[every, place][there])
            assert not np.any(actions[~there])
        done = done + some
    np.testing.assert_array_equal(state.count, np.full(len(done), LENGTH))
    return expected.levels


@pytest.mark.parametrize("at", ["last", "first"])
def test_characters_of_several_bytes_decode_in_pieces(at):
    config = config_of("characters").with_settings(characters={"every": 2, "at": at})
    text = "一二 三a四五é六七".encode()
    rows = [b"\xfe" + text, text[1:], "😀".encode() * 6, text[2:]]
    bytes = jnp.asarray([list((row + b"a" * LENGTH)[:LENGTH]) for row in rows], jnp.int32)
    check_in_pieces(registered("characters", config), bytes=bytes)


def test_greedy_boundaries_need_no_keys():
    check_in_pieces(registered("sfe"), keys=None)


def with_chunker(chunker):
    config = config_of("sfe")
    model = registered("sfe", config)
    return eqx.tree_at(lambda m: m.stage.estimator.chunker, model, lively(chunker))


DOWN = {
    "select": Select(),
    "mean": MeanPool(SHAPE.dim, key=jax.random.key(0)),
    "average": AveragePool(),
    "max": MaxPool(),
    "attention": AttentionPool(SHAPE.dim, 2, key=jax.random.key(0)),
    "max+boundary": WithBoundary(MaxPool()),
}
UP = {
    "distribute": Distribute(),
    "deviation": Deviation(),
    "smooth": Smooth(),
    "confidence": Smooth(Projection(SHAPE.dim), weighting="confidence"),
    "unsmoothed": Smooth(smoothing=False, weighting="none"),
}
PAIRS = (
    [(down, "distribute") for down in DOWN] + [("select", up) for up in UP] + [("mean", "deviation"), ("max", "smooth")]
)


@pytest.mark.parametrize(("down", "up"), PAIRS, ids=[f"{down}-{up}" for down, up in PAIRS])
def test_every_pair_of_ways_down_and_up_decodes_in_pieces(down, up):
    check_in_pieces(with_chunker(Chunker(DOWN[down], UP[up])), pieces=BY_BYTE)


def test_wide_tokens_need_a_way_up_that_takes_them():
    chunker = Chunker(AttentionPool(SHAPE.dim, 2, vectors=2, key=jax.random.key(0)), Distribute())
    hidden, actions = jnp.zeros((1, 4, SHAPE.dim)), jnp.ones((1, 4), bool)
    drawn = Boundaries(actions, hidden[..., 0], hidden[..., 0], actions, actions)
    tokens = chunker.down(hidden, drawn, capacity=4).tokens
    with pytest.raises(ValueError, match="tokens of width 32 at positions of width 16 need LeaveToDecoder"):
        chunker.up(tokens.values, tokens, hidden, drawn)


@pytest.mark.parametrize(
    "changes",
    [
        {"isotropic": {"token_level": False}, "estimator": "isotropic"},
        {"entropy": {"rule": "combined"}, "estimator": "entropy"},
        {"entropy": {"rule": "rise"}, "estimator": "entropy"},
        {"policy": {"window": 9}},
        {"unet": {"token_positions": "chunk"}},
        {"unet": {"window": 40, "encoder_layers": 0, "main_layers": 0, "decoder_layers": 2}},
    ],
    ids=str,
)
def test_settings_decode_in_pieces(changes):
    config = config_of(changes.get("estimator", "sfe"))
    for name, change in changes.items():
        if name == "unet":
            config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, **change))
        elif name != "estimator":
            config = config.with_settings(**{name: change})
    check_in_pieces(registered(config.estimator, config))


def hierarchy(router, chunker, inner, seed, **settings):
    stacks = [transformer(1, SHAPE.dim, 2, 16, window=3, key=jax.random.key(seed + i)) for i in range(2)]
    return Hierarchy(stacks[0], lively(Estimator(router, chunker, NoObjective())), inner, stacks[1], **settings)


@pytest.mark.parametrize(
    ("chunker", "pieces"),
    [
        (Chunker(Select(), Smooth()), PIECES),
        (Chunker(MeanPool(16, key=jax.random.key(0)), Distribute()), BY_BYTE),
    ],
    ids=["smooth", "mean"],
)
def test_a_hierarchy_inside_a_hierarchy_decodes_in_pieces(chunker, pieces):
    flat = Flat(transformer(1, SHAPE.dim, 2, 16, window=None, key=jax.random.key(1)))
    middle = hierarchy(WindowedPolicy(SHAPE.dim, window=2, target_rate=0.4), Chunker(Select(), Distribute()), flat, 20)
    outer = hierarchy(WindowedPolicy(SHAPE.dim, window=3, target_rate=0.6), chunker, middle, 30, chunk_positions=True)
    model = eqx.tree_at(lambda m: m.stage, registered("sfe"), outer)
    levels = check_in_pieces(model, pieces=pieces)
    tokens = [int(level.lengths.sum()) for level in levels]
    assert len(levels) == 2
    assert 4 < tokens[1] < tokens[0] < 4 * LENGTH


def test_a_recurrent_token_level_decodes_from_the_first_byte_on():
    """Its state has no KV cache, so nothing is allocated, and a single first byte goes through the closed sequences."""
    mixer = Mamba2(32, state=4, key=jax.random.key(1))
    inner = Widened(jnp.ones(16), Flat(Stack([PreNorm(32, mixer, None)])))
    outer = hierarchy(WindowedPolicy(SHAPE.dim, window=2, target_rate=0.4), Chunker(Select(), Distribute()), inner, 20)
    model = eqx.tree_at(lambda m: m.stage, registered("sfe"), outer)
    state, bytes = model.init_state(4, KEYS), text_bytes(4, 6)
    assert not is_unallocated(state.stage.inner)
    assert is_unallocated(state)
    expected = whole(model, bytes, KEYS).logits
    for place in range(6):
        prediction, state = decode(model, bytes[:, place : place + 1], state, jnp.ones(4, jnp.int32))
        np.testing.assert_allclose(prediction.logits[:, 0], expected[:, place], **BOUNDED)
    assert not is_unallocated(state)


def test_a_rule_that_looks_back_is_given_as_many_bytes_as_it_reaches():
    def after_two_vowels(layout: Layout):
        vowel = (layout.bytes[..., None] == jnp.asarray([*b"aeiou"])).any(-1)
        back = [jnp.pad(vowel[:, :-shift], ((0, 0), (shift, 0))) for shift in (1, 2)]
        return back[0] & back[1]

    rules = [(after_two_vowels, 2), (EveryNth(3), 5)]
    for rule, reach in rules:
        model = eqx.tree_at(lambda m: m.stage.estimator.router, registered("whitespace"), RuleRouter(rule, reach))
        check_in_pieces(model)


def test_what_a_row_draws_depends_on_its_own_key_and_number_only():
    model, bytes = registered("sfe"), text_bytes(4, LENGTH, seed=4)
    together = whole(model, bytes, KEYS).levels[0].boundaries.actions
    alone = whole(model, bytes[2:3, : LENGTH - 5], KEYS[2:3]).levels[0].boundaries.actions
    np.testing.assert_array_equal(together[2:3, : LENGTH - 5], alone)
    other = whole(model, bytes, KEYS[::-1]).levels[0].boundaries.actions
    assert np.any(other != together)


def test_uniform_boundaries_drawn_row_by_row_meet_their_rate():
    model, bytes = registered("uniform"), text_bytes(4, 2000, seed=4)
    rate = float(whole(model, bytes, KEYS).levels[0].boundaries.actions.mean())
    assert rate == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 8000) ** 0.5)


def test_a_full_token_cache_says_so():
    model, bytes = registered("isotropic"), text_bytes(4, LENGTH)
    _, state = prefill(model, bytes, jnp.asarray(LENGTHS).at[1].set(LENGTH), KEYS)
    logits = decode(model, bytes[:, :1], state, jnp.ones(4, jnp.int32))[0].logits
    assert np.all(np.isnan(logits[1]))
    assert np.all(np.isfinite(logits[0]))
    roomy = decode(model, bytes[:, :1], with_room(state, 1), jnp.ones(4, jnp.int32))[0].logits
    assert np.all(np.isfinite(roomy))


def test_padding_beyond_a_cache_does_not_spoil_what_fits():
    config = config_of("isotropic")
    config = dataclasses.replace(config, unet=dataclasses.replace(SHAPE, main_layers=2))
    model, bytes = registered("isotropic", config), text_bytes(4, LENGTH)
    _, state = prefill(model, bytes, [1, 7, LENGTH - 1, 16], KEYS)
    got, _ = decode(model, bytes[:, :5], state, jnp.ones(4, jnp.int32))
    assert np.all(np.isfinite(got.logits[:, 0]))
    got, _ = decode(model, bytes[:, :5], state, jnp.full(4, 2))
    assert np.isnan(got.logits[2, 1]).all()
    assert np.all(np.isfinite(got.logits[:2, :2]))


def spoiled(cache):
    """With slots that turn whatever reads them into no number, from the middle on."""
    if not isinstance(cache, KVCache) or cache.window is not None:
        return cache
    spoil = (rows.at[:, :, cache.slots // 2 :].set(jnp.nan) for rows in (cache.keys, cache.values))
    return eqx.tree_at(lambda cache: (cache.keys, cache.values), cache, tuple(spoil))


def test_a_quarter_of_a_batch_reads_only_slots_that_are_filled():
    def after_z(layout: Layout):
        return layout.bytes == ord("z")

    model = eqx.tree_at(lambda m: m.stage.estimator.router, registered("whitespace"), RuleRouter(after_z, 0))
    keys = jax.random.split(jax.random.key(0), 8)
    _, state = prefill(model, jnp.full((8, LENGTH), ord("z")), jnp.arange(8) + 3, keys)
    state = with_room(state, 150)
    holed = jax.tree.map(spoiled, state, is_leaf=lambda part: isinstance(part, KVCache))
    for bytes, read in ((b"azaaazaa", False), (b"zzzaaaaa", True)):
        bytes, going = jnp.asarray(list(bytes))[:, None], jnp.ones(8, jnp.int32)
        expected, found = (decode(model, bytes, one, going)[0].logits for one in (state, holed))
        assert bool(jnp.all(jnp.isfinite(found))) != read
        if not read:
            np.testing.assert_array_equal(found, expected)


def test_filled_quarters_are_those_of_the_fullest_cache_with_room_for_one_more():
    ones = jnp.ones((3, 8, 1, 1))

    def filled(*counts):
        caches = [filled_cache(ones, ones, one, None) for one in counts]
        return int(filled_quarters(caches, jnp.asarray([0, 2])))

    assert [filled([count, 8, 0]) for count in range(9)] == [1, 1, 2, 2, 3, 3, 4, 4, 4]
    assert filled([1, 0, 3], [2, 0, 5]) == 3
    ring = filled_cache(ones, ones, [8, 8, 8], 4)
    assert int(filled_quarters(ring, jnp.asarray([0]))) == 1


def test_levels_inside_levels_read_what_is_filled(monkeypatch):
    monkeypatch.setattr("unet.decoding.sparse.MIN_SLICED_SLOTS", 1)
    flat = Flat(transformer(1, SHAPE.dim, 2, 16, window=None, key=jax.random.key(1)))
    middle = hierarchy(WindowedPolicy(SHAPE.dim, window=2, target_rate=0.4), Chunker(Select(), Distribute()), flat, 20)
    outer = hierarchy(WindowedPolicy(SHAPE.dim, window=3, target_rate=0.6), Chunker(Select(), Distribute()), middle, 30)
    model = eqx.tree_at(lambda m: m.stage, registered("sfe"), outer)
    check_in_pieces(model, 2 * LENGTHS, jax.random.split(jax.random.key(8), 8), room=0, pieces=BY_BYTE)


def filled_cache(keys, values, lengths, window):
    """A cache after a first update."""
    batch, _, heads, head_dim = keys.shape
    return KVCache.empty(batch, heads, head_dim, window).updated(KVUpdate(keys, values), jnp.asarray(lengths))


def test_positions_lie_in_their_slots_and_those_that_wait_stay():
    keys = jnp.arange(7.0).reshape(1, 7, 1, 1)
    ring = filled_cache(keys, -keys, [6], 4)
    assert ring.keys.ravel().tolist() == [4, 5, 2, 3]
    assert ring.visible(2).tolist() == [[[True, True, False, True], [True, True, False, False]]]
    new = KVUpdate(jnp.full((1, 1, 1, 1), 9.0), jnp.full((1, 1, 1, 1), 8.0))
    assert eqx.tree_equal(ring.updated(new, jnp.asarray([0])), ring)
    went = ring.updated(new, jnp.asarray([1]))
    assert went.keys.ravel().tolist() == [4, 5, 9, 3]
    assert went.values.ravel().tolist() == [-4, -5, 8, -3]
    assert went.lengths.tolist() == [7]


def test_of_more_new_positions_than_a_window_the_last_stay():
    keys = jnp.arange(20.0).reshape(1, 20, 1, 1)
    ring = filled_cache(keys[:, :3], keys[:, :3], [3], 4)
    went = ring.updated(KVUpdate(keys[:, 3:12], keys[:, 3:12]), jnp.asarray([6]))
    assert went.keys.ravel().tolist() == [8, 5, 6, 7]
    assert went.lengths.tolist() == [9]


def test_only_token_caches_grow():
    ones = jnp.ones((2, 10, 3, 4))
    caches = (filled_cache(ones, ones, [10, 3], None), filled_cache(ones, ones, [10, 3], 5))
    before = cache_bytes(caches)
    grown = with_room(caches, 9)
    assert [cache.slots for cache in grown] == [20, 5]
    assert cache_bytes(grown) - before == 2 * 2 * 3 * 10 * 4 * 4
    assert eqx.tree_equal(with_room(grown, 10), grown)
    assert with_room(grown, 11)[0].slots == 24


@pytest.mark.parametrize(
    ("size", "slots"), [(1, 16), (16, 16), (17, 20), (33, 40), (128, 128), (129, 160), (60_000, 65_536)]
)
def test_slots_waste_a_quarter_at_most(size, slots):
    assert rounded_up(size) == slots


def test_an_update_leaves_alone_what_does_not_advance():
    old, new = {"a": jnp.zeros((2, 3)), "b": None}, {"a": jnp.ones((2, 3)), "b": None}
    np.testing.assert_array_equal(update_state(old, new, jnp.asarray([1, 0]))["a"], [[1, 1, 1], [0, 0, 0]])
