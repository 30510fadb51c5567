"""Fresh models: every weight drawn for itself, and room for the boundaries with which they start."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import Bernoulli, CosineRouter, Greedy, MLPRouter, OffPolicy, SamplingOptions, WindowedPolicy
from estimators.keys import named_key
from estimators.registry import ESTIMATORS
from experiments.config.build import build_estimators, build_model
from experiments.config.presets import PRESETS
from experiments.training.capacity import inner_capacities, rated_capacities
from experiments.training.target import TargetSchedule, TargetState
from tests.compositions import FROM_DATA, SHAPE, config_of
from tests.conftest import text_bytes
from unet import HNetConfig
from unet.likelihood import plain_layout
from unet.ops import boundary_scan

NESTED = HNetConfig(
    layout='["m1", ["T1m1", ["T1"], "m1T1"], "m1"]',
    dims=(32, 32, 32),
    mlp_dims=(0, 64, 64),
    heads=(2, 2, 2),
    rotary_dims=(4, 4, 4),
    windows=(8, 8, 0),
    state=8,
)
PREFIX = 24


def orders(leaf):
    """The order of the first numbers of an array read by rows and by columns: the same for scaled and for transposed copies."""
    values = np.asarray(leaf, np.float64)
    return {tuple(np.argsort(flat.ravel()[:PREFIX])) for flat in (values, values.T)}


def copies(model):
    """Pairs of leaves that were drawn alike; the early head is meant to start as the output head."""
    model = eqx.tree_at(lambda m: m.early_head, model, None, is_leaf=lambda part: part is None)
    seen, pairs = {}, []
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        if not eqx.is_inexact_array(leaf) or leaf.size < PREFIX or len(np.unique(np.asarray(leaf))) < PREFIX:
            continue
        name = jax.tree_util.keystr(path)
        for order in orders(leaf):
            pairs += [(other, name) for other in seen.get(order, ())]
        for order in orders(leaf):
            seen.setdefault(order, []).append(name)
    return pairs


def test_transposed_and_scaled_copies_are_seen():
    weight = jax.random.normal(jax.random.key(0), (8, 5))
    fresh = build_model(config_of("uniform"), jax.random.key(0))
    assert copies(fresh) == []
    spoiled = eqx.tree_at(lambda m: (m.norm.weight, m.head.weight), fresh, (weight, 3.0 * weight.T))
    assert len(set(copies(spoiled))) == 1


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS.house) - set(FROM_DATA)))
def test_no_two_weights_of_a_model_of_one_level_are_drawn_alike(name):
    pool = None if name == "gumbel" else "attention"
    attends = name == "sfe-mlp"
    unet = dataclasses.replace(SHAPE, ngrams=(2, 3), ngram_buckets=32, attend="every" if attends else "none")
    chunker = "attend" if attends else None
    config = dataclasses.replace(config_of(name), unet=unet, pool=pool, chunker=chunker)
    assert copies(eqx.filter_jit(lambda: build_model(config, jax.random.key(0)))()) == []


@pytest.mark.parametrize("inner", ["sfe-mlp", "hnet"])
def test_no_two_weights_of_a_hierarchy_are_drawn_alike(inner):
    """The router of level 1 once had the key of the pool of level 0."""
    config = dataclasses.replace(
        config_of("sfe-mlp"),
        unet=NESTED,
        inner_estimators=(inner,),
        inner_rates=(0.4,),
        pool="attention",
        settings={"hnet": {"routing": "direct"}, "attention_pool": {"heads": 2}},
    )
    assert copies(eqx.filter_jit(lambda: build_model(config, jax.random.key(0)))()) == []


def test_names_make_keys_that_numbers_do_not():
    key = jax.random.key(3)
    names = [named_key(key, name) for name in ("router", "pool", "level 0", "level 1")]
    names += [named_key(key, "level 0", "pool"), *jax.random.split(key, 4)]
    assert len({tuple(jax.random.key_data(one).tolist()) for one in names}) == len(names)


RATED = sorted(set(ESTIMATORS.house) - set(FROM_DATA) - {"whitespace", "spacelike", "characters"})


@pytest.mark.parametrize(("name", "routing"), [*((name, "cosine") for name in RATED), ("hnet", "direct")])
def test_a_fresh_router_draws_about_its_initial_rate_and_a_step_has_room_for_it(name, routing):
    config = dataclasses.replace(config_of(name), length=128, rate=0.2, capacity_slack=1.35)
    config = config.with_settings(hnet={"routing": routing})
    model = eqx.filter_jit(lambda: build_model(config, jax.random.key(0)))()
    router = model.estimators[0].router
    assert router.initial_rate is not None
    prediction = eqx.filter_jit(lambda m, b: m(b, key=jax.random.key(1), training=True))(model, text_bytes(16, 128))
    drawn = np.asarray(prediction.levels[0].boundaries.actions)
    # A router of likelier actions and fresh cosines lie somewhere around one half.
    low, high = (0.1, 1.2) if router.initial_rate == 0.5 else (0.75, 1.25)
    assert low * router.initial_rate <= drawn.mean() <= high * router.initial_rate
    most = rated_capacities(config, router)[-1]
    assert np.maximum(drawn.sum(axis=1) - most, 0).sum() <= 0.005 * drawn.sum()


def test_capacities_have_room_for_the_rate_held_and_for_the_first():
    config = dataclasses.replace(config_of("sfe"), length=1000, rate=0.2, capacity_slack=1.5, buckets=3)
    assert rated_capacities(config, WindowedPolicy(4, target_rate=0.2)) == (208, 252, 300)
    assert rated_capacities(config, Greedy(CosineRouter(4, target_rate=0.2))) == (208, 252, 300, 752)
    one = dataclasses.replace(config, buckets=1)
    assert rated_capacities(one, WindowedPolicy(4, target_rate=0.2)) == (300,)
    assert rated_capacities(one, CosineRouter(4, target_rate=0.2)) == (752,)
    assert rated_capacities(config, CosineRouter(4, target_rate=0.8)) == (824, 996, 1000)
    # A router that has learned another rate before.
    assert rated_capacities(config, WindowedPolicy(4, target_rate=0.2), 0.4) == (208, 252, 300, 600)
    assert rated_capacities(config, WindowedPolicy(4, target_rate=0.2), 0.1) == (208, 252, 300)
    every = dataclasses.replace(config, length=10)
    isotropic = build_estimators(config_of("isotropic"), jax.random.key(0))[0].router
    assert rated_capacities(every, isotropic) == (10,)


def test_inner_levels_have_room_for_what_cosines_draw_first():
    config = dataclasses.replace(config_of("hnet"), length=1000, capacity_slack=1.5)
    routers = [Greedy(CosineRouter(4, target_rate=rate)) for rate in (0.2, 0.2)]
    # One half of one half, and not a fifth of a fifth.
    assert inner_capacities(config, routers, 752) == (376,)


def test_direct_routing_starts_with_boundaries():
    """At the logit of the target rate the likelier action would be none, everywhere."""
    config = dataclasses.replace(config_of("hnet"), rate=0.2).with_settings(hnet={"routing": "direct"})
    router = build_estimators(config, jax.random.key(0))[0].router
    hidden = jax.random.normal(jax.random.key(1), (8, 64, SHAPE.dim))
    drawn = router(hidden, plain_layout(text_bytes(8, 64)), SamplingOptions(boundary_scan)).actions
    assert 0.2 < np.asarray(drawn).mean() < 0.8


def test_rates_drawn_by_lot_follow_the_target_and_learned_ones_do_not():
    layout, hidden = plain_layout(text_bytes(16, 256)), jax.random.normal(jax.random.key(2), (16, 256, 8))
    asked = SamplingOptions(boundary_scan, key=jax.random.key(3), target_rate=jnp.asarray(0.6), training=True)

    def rate(router):
        return float(np.asarray(router(hidden, layout, asked).actions).mean())

    assert rate(Bernoulli(0.2)) == pytest.approx(0.6, abs=0.03)
    assert rate(OffPolicy(WindowedPolicy(8), Bernoulli(0.2))) == pytest.approx(0.6, abs=0.03)
    assert rate(WindowedPolicy(8, target_rate=0.2)) == pytest.approx(0.2, abs=0.03)
    assert rate(MLPRouter(8, target_rate=0.2, key=jax.random.key(4))) == pytest.approx(0.2, abs=0.04)


def test_the_behaviour_is_weighted_by_the_rate_it_drew_at():
    layout, hidden = plain_layout(text_bytes(2, 16)), jax.random.normal(jax.random.key(2), (2, 16, 8))
    options = SamplingOptions(boundary_scan, key=jax.random.key(3), target_rate=jnp.asarray(0.6), training=True)
    drawn = OffPolicy(WindowedPolicy(8), Bernoulli(0.2))(hidden, layout, options)
    expected = np.where(np.asarray(drawn.actions), np.log(0.6), np.log(0.4))
    assert drawn.behaviour_log_prob is not None
    np.testing.assert_allclose(drawn.behaviour_log_prob, expected, rtol=1e-5)


def test_the_controller_sees_boundaries_for_which_there_was_no_room():
    schedule = TargetSchedule(0.2, 0.2, 1, 0.5)
    kept, dropped = 0.2, 0.1
    state = schedule.moved(TargetState(), jnp.asarray(kept + dropped))
    assert float(schedule.target(state)) < 0.2


def test_presets_have_no_slack_of_their_own():
    """What a router draws at its start says how much room it needs."""
    assert {config.capacity_slack for config in PRESETS.values()} == {1.35}
    assert [(level.estimator, level.rate) for level in PRESETS["hnet-tiny"].levels] == [("hnet", 0.2)]


@pytest.mark.parametrize(
    ("heads", "said"),
    [(0, "a width that its heads divide"), (-1, "heads must be a whole number from 0 to 65536; got -1")],
)
def test_attention_to_tokens_needs_heads(heads, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(
            NESTED, layout='["m1", ["m1", ["T1"], "m1"], "m1"]', heads=(heads, heads, 2), attend="every"
        )
