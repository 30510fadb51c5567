"""Row by row: after a prefill of the first bytes, steps give the logits and boundaries of one call on the whole text."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import EveryNth, NoObjective, RuleRouter, WindowedPolicy
from estimators.base import Estimator, Layout, written
from experiments.config.registry import REGISTRY
from experiments.config.sections import CharactersConfig
from tests.compositions import LENGTH, SHAPE, config_of, lively, registered
from tests.conftest import text_bytes
from unet import Flat, Hierarchy, MeanPool, Projection, SelectDeviate, SelectDistribute, SelectSmooth
from unet.blocks import transformer
from unet.cache import RowCache, cache_bytes, filled_cache, filled_quarters, rounded_up, with_room

BOUNDED = {"rtol": 1e-4, "atol": 1e-4}
LENGTHS = (1, 7, LENGTH - 1, 16)
KEYS = jax.random.split(jax.random.key(8), len(LENGTHS))


@eqx.filter_jit
def whole(model, bytes, keys):
    return model(bytes, key=keys)


@eqx.filter_jit
def prefill(model, bytes, lengths, keys):
    return model.prefill(bytes, mask=jnp.arange(bytes.shape[1]) < lengths[:, None], keys=keys)


@eqx.filter_jit
def step(model, bytes, state, advance):
    after = model.step(bytes, state, advance)
    return after.logits, after.closed, written(state, after.change, advance)


def check_row_by_row(model, lengths=LENGTHS, keys=KEYS, room=LENGTH, bytes=None):
    """Every prediction and every boundary, sequences going on when a coin says so."""
    bytes = text_bytes(len(lengths), LENGTH, seed=4) if bytes is None else bytes
    expected = whole(model, bytes, keys)
    done = np.asarray(lengths)
    ready = prefill(model, bytes, jnp.asarray(lengths), keys)
    read = np.arange(LENGTH) < done[:, None]
    np.testing.assert_allclose(ready.logits[read], expected.logits[read], **BOUNDED)
    for before, level in zip(ready.prediction.levels[:1], expected.levels[:1], strict=True):
        np.testing.assert_array_equal(before.boundaries.actions[read], level.boundaries.actions[read])
    state, coins, outer = with_room(ready.state, room), np.random.default_rng(0), 0
    while (done < LENGTH).any():
        advance = (coins.random(len(done)) < 0.6) & (done < LENGTH)
        here = np.minimum(done, LENGTH - 1)
        every = np.arange(len(done))
        logits, closed, state = step(model, bytes[every, here], state, jnp.asarray(advance))
        np.testing.assert_allclose(logits[advance], expected.logits[every, here][advance], **BOUNDED)
        if closed:
            drawn = np.asarray(expected.levels[0].boundaries.actions[every, here])
            np.testing.assert_array_equal(closed[0][advance], drawn[advance])
            assert not np.any(closed[0][~advance])
            outer += int(closed[0].sum())
        done = done + advance
    np.testing.assert_array_equal(state.count, np.full(len(done), LENGTH))
    return outer


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_estimator_steps_as_it_reads(name):
    drawn = check_row_by_row(registered(name))
    assert drawn > 0, "no boundary was drawn in a step, so that nothing was tested"


@pytest.mark.parametrize("at", ["last", "first"])
def test_characters_of_several_bytes_step_as_they_are_read(at):
    config = dataclasses.replace(config_of("characters"), characters=CharactersConfig(2, at))
    text = "一二 三a四五é六七".encode()
    rows = [b"\xfe" + text, text[1:], "😀".encode() * 6, text[2:]]
    bytes = jnp.asarray([list((row + b"a" * LENGTH)[:LENGTH]) for row in rows], jnp.int32)
    assert check_row_by_row(registered("characters", config), bytes=bytes) > 0


def test_likelier_boundaries_need_no_keys():
    check_row_by_row(registered("sfe"), keys=None)


def with_chunker(chunker):
    config = config_of("sfe")
    model = registered("sfe", config)
    return eqx.tree_at(lambda m: m.stage.estimator.chunker, model, lively(chunker))


@pytest.mark.parametrize(
    "chunker",
    [
        SelectDeviate(),
        SelectSmooth(Projection(SHAPE.dim), weighting="confidence"),
        SelectSmooth(smoothing=False, weighting="none"),
        MeanPool(SHAPE.dim, key=jax.random.key(0)),
    ],
    ids=["deviate", "confidence", "unsmoothed", "mean"],
)
def test_every_chunker_steps_as_it_reads(chunker):
    check_row_by_row(with_chunker(chunker))


@pytest.mark.parametrize(
    "changes",
    [
        {"isotropic": {"token_level": False}, "estimator": "isotropic"},
        {"entropy": {"rule": "combined"}, "estimator": "entropy"},
        {"entropy": {"rule": "rise"}, "estimator": "entropy"},
        {"sfe": {"window": 9}},
        {"unet": {"token_positions": "chunk"}},
        {"unet": {"window": 40, "encoder_layers": 0, "main_layers": 0, "decoder_layers": 2}},
    ],
    ids=str,
)
def test_settings_step_as_they_read(changes):
    config = config_of(changes.get("estimator", "sfe"))
    for name, change in changes.items():
        value = change if name == "estimator" else dataclasses.replace(getattr(config, name), **change)
        config = dataclasses.replace(config, **{name: value})
    check_row_by_row(registered(config.estimator, config))


def hierarchy(router, chunker, inner, seed, **settings):
    stacks = [transformer(1, SHAPE.dim, 2, 16, window=3, key=jax.random.key(seed + i)) for i in range(2)]
    return Hierarchy(stacks[0], lively(Estimator(router, chunker, NoObjective())), inner, stacks[1], **settings)


@pytest.mark.parametrize("chunker", [SelectSmooth(), MeanPool(16, key=jax.random.key(0))], ids=["smooth", "mean"])
def test_a_hierarchy_inside_a_hierarchy_steps_as_it_reads(chunker):
    flat = Flat(transformer(1, SHAPE.dim, 2, 16, window=None, key=jax.random.key(1)))
    middle = hierarchy(WindowedPolicy(SHAPE.dim, window=2, target_rate=0.4), SelectDistribute(), flat, 20)
    outer = hierarchy(WindowedPolicy(SHAPE.dim, window=3, target_rate=0.6), chunker, middle, 30, chunk_positions=True)
    model = eqx.tree_at(lambda m: m.stage, registered("sfe"), outer)
    check_row_by_row(model)
    levels = whole(model, text_bytes(4, LENGTH, seed=4), KEYS).levels
    tokens = [int(level.lengths.sum()) for level in levels]
    assert len(levels) == 2
    assert 4 < tokens[1] < tokens[0] < 4 * LENGTH


def test_a_rule_that_looks_back_is_given_as_many_bytes_as_it_reaches():
    def after_two_vowels(layout: Layout):
        vowel = (layout.bytes[..., None] == jnp.asarray([*b"aeiou"])).any(-1)
        back = [jnp.pad(vowel[:, :-shift], ((0, 0), (shift, 0))) for shift in (1, 2)]
        return back[0] & back[1]

    rules = [(after_two_vowels, 2), (EveryNth(3), 5)]
    for rule, reach in rules:
        model = eqx.tree_at(lambda m: m.stage.estimator.router, registered("whitespace"), RuleRouter(rule, reach))
        check_row_by_row(model)


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
    ready = prefill(model, bytes, jnp.asarray(LENGTHS).at[1].set(LENGTH), KEYS)
    logits, _, _ = step(model, bytes[:, 0], ready.state, jnp.ones(4, bool))
    assert np.all(np.isnan(logits[1]))
    assert np.all(np.isfinite(logits[0]))
    roomy, _, _ = step(model, bytes[:, 0], with_room(ready.state, 1), jnp.ones(4, bool))
    assert np.all(np.isfinite(roomy))


def spoiled(cache):
    """With slots that turn whatever reads them into no number, from the middle on."""
    if not isinstance(cache, RowCache) or cache.ring:
        return cache
    spoil = (rows.at[:, :, cache.slots // 2 :].set(jnp.nan) for rows in (cache.keys, cache.values))
    return eqx.tree_at(lambda cache: (cache.keys, cache.values), cache, tuple(spoil))


def test_a_quarter_of_a_batch_reads_only_slots_that_are_filled():
    def after_z(layout: Layout):
        return layout.bytes == ord("z")

    model = eqx.tree_at(lambda m: m.stage.estimator.router, registered("whitespace"), RuleRouter(after_z, 0))
    lengths, going = jnp.arange(8) + 3, jnp.ones(8, bool)
    ready = prefill(model, jnp.full((8, LENGTH), ord("z")), lengths, jax.random.split(jax.random.key(0), 8))
    state = with_room(ready.state, 150)
    holed = jax.tree.map(spoiled, state, is_leaf=lambda part: isinstance(part, RowCache))
    for bytes, read in ((b"azaaazaa", False), (b"zzzaaaaa", True)):
        bytes = jnp.asarray(list(bytes))
        expected, found = (step(model, bytes, one, going)[0] for one in (state, holed))
        assert bool(jnp.all(jnp.isfinite(found))) != read
        if not read:
            np.testing.assert_array_equal(found, expected)


def test_filled_quarters_are_those_of_the_fullest_cache_with_room_for_one_more():
    rows = jnp.ones((3, 1, 8, 1))

    def filled(*counts):
        caches = [filled_cache(rows, rows, jnp.asarray(one), None) for one in counts]
        return int(filled_quarters(caches, jnp.asarray([0, 2])))

    assert [filled([count, 8, 0]) for count in range(9)] == [1, 1, 2, 2, 3, 3, 4, 4, 4]
    assert filled([1, 0, 3], [2, 0, 5]) == 3
    ring = filled_cache(rows, rows, jnp.asarray([8, 8, 8]), 4)
    assert int(filled_quarters(ring, jnp.asarray([0]))) == 1


def test_levels_inside_levels_read_what_is_filled(monkeypatch):
    monkeypatch.setattr("unet.stage.MANY_SLOTS", 1)
    flat = Flat(transformer(1, SHAPE.dim, 2, 16, window=None, key=jax.random.key(1)))
    middle = hierarchy(WindowedPolicy(SHAPE.dim, window=2, target_rate=0.4), SelectDistribute(), flat, 20)
    outer = hierarchy(WindowedPolicy(SHAPE.dim, window=3, target_rate=0.6), SelectDistribute(), middle, 30)
    model = eqx.tree_at(lambda m: m.stage, registered("sfe"), outer)
    check_row_by_row(model, 2 * LENGTHS, jax.random.split(jax.random.key(8), 8), room=0)


def test_rows_lie_in_their_slots_and_those_that_wait_stay():
    keys = jnp.arange(7.0).reshape(1, 1, 7, 1)
    ring = filled_cache(keys, -keys, jnp.asarray([6]), 4)
    assert ring.keys.ravel().tolist() == [4, 5, 2, 3]
    assert ring.seen.tolist() == [[True, True, False, True]]
    nine = eqx.tree_at(
        lambda row: (row.key, row.value), new_row(), (jnp.full((1, 1, 1), 9.0), jnp.full((1, 1, 1), 8.0))
    )
    assert eqx.tree_equal(ring.written(nine, jnp.asarray([False])), ring)
    went = ring.written(nine, jnp.asarray([True]))
    assert went.keys.ravel().tolist() == [4, 5, 9, 3]
    assert went.values.ravel().tolist() == [-4, -5, 8, -3]
    assert went.count.tolist() == [7]


def new_row():
    from unet.cache import NewRow

    return NewRow(jnp.zeros((1, 1, 1)), jnp.zeros((1, 1, 1)))


def test_only_token_caches_grow():
    rows = jnp.ones((2, 3, 10, 4))
    caches = (filled_cache(rows, rows, jnp.asarray([10, 3]), None), filled_cache(rows, rows, jnp.asarray([10, 3]), 5))
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


def test_written_leaves_alone_what_does_not_advance():
    kept = written({"a": jnp.zeros((2, 3)), "b": None}, {"a": jnp.ones((2, 3)), "b": None}, jnp.asarray([True, False]))
    np.testing.assert_array_equal(kept["a"], [[1, 1, 1], [0, 0, 0]])
