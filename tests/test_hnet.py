"""Hierarchies inside hierarchies: shapes, presets, rewards of inner levels, and the training recipe."""

import dataclasses
import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import (
    BatchCentre,
    Discount,
    EarlyExit,
    NoObjective,
    ScoreFunction,
    ScoreFunctionObjective,
    WindowedPolicy,
    equations,
)
from estimators.base import Estimator
from estimators.registry import ESTIMATORS
from experiments import export
from experiments.config.build import build_estimators, require_fit
from experiments.config.errors import ConfigError
from experiments.config.files import from_json, to_json
from experiments.config.presets import PRESETS
from experiments.config.sections import TargetConfig
from experiments.config.settings import RunConfig
from experiments.training.capacity import inner_capacities
from experiments.training.initial import initial_weights
from experiments.training.optimizer import make_optimizer, make_schedule, multipliers, stages_of
from tests.compositions import FROM_DATA, LENGTH, lively
from tests.conftest import losses, predict, small_model, text_bytes
from tests.test_decoding import check_in_pieces
from tests.test_generate import check_against_the_whole
from unet import (
    Chunker,
    Distribute,
    Flat,
    Hierarchy,
    HNetConfig,
    LoadError,
    Select,
    UNet,
    Widened,
    generate,
    load_hnet,
    save,
    save_hnet,
    score,
    to_reference,
)
from unet.attention import Attention
from unet.blocks import PreNorm
from unet.decoding.score import keys_of
from unet.hnet import read_layout
from unet.layers import Affine, Linear, SwiGLU
from unet.likelihood import next_logprobs, plain_layout
from unet.losses import Reward
from unet.mamba import Mamba2

SMALL = HNetConfig(
    layout='["m1", ["T1m1", ["T1"], "t1"], "m1"]',
    dims=(32, 32, 64),
    mlp_dims=(0, 128, 128),
    heads=(2, 2, 4),
    rotary_dims=(8, 8, 8),
    windows=(4, 5, 0),
    state=4,
)


def nested_config(outer: str, inner: str = "sfe") -> RunConfig:
    config = dataclasses.replace(
        PRESETS["hnet-2stage-tiny"],
        unet=SMALL,
        estimator=outer,
        inner_estimators=(inner,),
        rate=0.5,
        inner_rates=(0.4,),
    )
    return config.with_settings(policy={"window": 2})


def nested(outer: str, inner: str = "sfe") -> UNet:
    config = nested_config(outer, inner)
    return UNet(config.unet, lively(build_estimators(config, jax.random.key(1))), key=jax.random.key(2))


@pytest.mark.parametrize("inner", [name for name in ESTIMATORS.house if name not in (*FROM_DATA, "characters")])
def test_every_estimator_works_inside_another(inner):
    model = nested("sfe" if inner == "hnet" else "hnet", inner)
    bytes = text_bytes(3, LENGTH, seed=4)
    output = losses(model, bytes, key=jax.random.key(0), capacities=(20, 12))
    assert np.isfinite(output.loss)
    assert 0 < float(output.metrics["level1_rate"]) <= 1


@pytest.mark.parametrize("inner", ["sfe", "hnet", "gumbel", "spacelike"])
def test_levels_inside_decode_in_pieces(inner):
    model = nested("sfe" if inner == "hnet" else "hnet", inner)
    check_in_pieces(model, (1, 9, LENGTH - 1), jax.random.split(jax.random.key(8), 3))


def test_what_is_written_says_which_levels_closed_a_token():
    model, keys = nested("sfe"), keys_of(jax.random.key(5), 2)
    written = generate(model, ["a man", ""], max_bytes=20, key=keys, chunk=8, endless=True)
    check_against_the_whole(model, written, keys)
    assert {0, 1, 2} == set(written.texts[1].piece.boundary_depth)
    (scored,) = score(model, [written.texts[1].piece.bytes], key=keys[1:], batch=1)
    np.testing.assert_array_equal(scored.boundary_depth, written.texts[1].piece.boundary_depth)


def test_rows_see_nothing_after_them_and_documents_nothing_of_each_other():
    model = nested("hnet", "hnet")
    bytes = text_bytes(2, LENGTH)
    changed = bytes.at[:, 15:].set(text_bytes(2, LENGTH, seed=3)[:, 15:])
    before, after = predict(model, bytes).logits[:, :15], predict(model, changed).logits[:, :15]
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-5)
    segments = jnp.asarray([[0] * 10 + [1] * 14] * 2)
    together = predict(model, bytes, segments=segments).logits
    for start, end in ((0, 10), (10, 24)):
        alone = predict(model, bytes[:, start:end]).logits
        np.testing.assert_allclose(together[:, start:end], alone, rtol=1e-4, atol=1e-5)


def two_policies(reductions=(), policy_weight=1.0):
    """Windowed policies at both levels, lively enough to draw varied boundaries."""

    def policy(seed):
        made = ScoreFunction(
            8,
            chunker=Chunker(Select(), Distribute()),
            target_rate=0.4,
            reductions=reductions,
            window=1,
            scale=1.0,
            policy_weight=policy_weight,
            rate_weight=0.0,
        )
        return eqx.tree_at(lambda e: e.router.weight, made, 0.3 * jax.random.normal(jax.random.key(seed), (2, 8)))

    outer, inner = small_model(policy(5), dim=8), small_model(policy(6), dim=8, seed=1)
    return eqx.tree_at(lambda m: m.stage.inner, outer, inner.stage)


@pytest.mark.parametrize("reductions", [(), (EarlyExit(),)], ids=["plain", "early exit"])
def test_the_expected_gradient_of_both_policies_is_that_of_the_expected_likelihood(reductions):
    """Over all boundary strings of both levels: rewards of chunks are such that the policy losses together have the gradient
    of E[sum of log-likelihoods], divided by the bytes that decide, for the outer and for the inner policy."""
    length, model = 5, two_policies(reductions)
    bytes = text_bytes(1, length)
    layout = plain_layout(bytes)
    outer = jnp.asarray([[1, *tail] for tail in itertools.product((0, 1), repeat=length - 1)], bool)
    inner = jnp.asarray([[1, *tail] for tail in itertools.product((0, 1), repeat=length - 1)], bool)

    def policies(model):
        return model.stage.estimator.router.weight, model.stage.inner.estimator.router.weight

    def at(weights, outer, inner):
        moved = eqx.tree_at(policies, model, weights)
        return moved, moved(bytes, actions=(outer[None], inner[None]), training=True)

    def log_prob(levels):
        each = [
            jnp.sum(jnp.where(b.decided, equations.action_log_prob(b.logits, b.actions), 0.0))
            for b in (level.boundaries for level in levels)
        ]
        return each[0] + each[1]

    def counted(outer, inner):
        """Each string of the inner level once: those whose rows behind the last token are zero."""
        return jnp.all(~inner | (jnp.arange(length) < jnp.sum(outer)))

    def expected(weights):
        def one(outer, inner):
            _, prediction = at(weights, outer, inner)
            total = jnp.sum(next_logprobs(prediction.logits, bytes))
            return jnp.where(counted(outer, inner), jnp.exp(log_prob(prediction.levels)), 0.0) * total

        return jnp.sum(jax.vmap(lambda a: jax.vmap(lambda b: one(a, b))(inner))(outer))

    def estimated(weights):
        def one(outer, inner):
            moved, prediction = at(weights, outer, inner)
            found = moved.losses(prediction, layout)
            loss = found.metrics["policy_loss"] + found.metrics["level1_policy_loss"]
            chance = jax.lax.stop_gradient(jnp.exp(log_prob(prediction.levels)))
            return jnp.where(counted(outer, inner), chance, 0.0) * loss

        return -(length - 1) * jnp.sum(jax.vmap(lambda a: jax.vmap(lambda b: one(a, b))(inner))(outer))

    weights = policies(model)
    wanted, got = jax.jit(jax.grad(expected))(weights), jax.jit(jax.grad(estimated))(weights)
    for exact, ours in zip(wanted, got, strict=True):
        assert float(jnp.max(jnp.abs(exact))) > 1e-4
        np.testing.assert_allclose(ours, exact, rtol=1e-3, atol=2e-6)


def test_a_chunk_is_rewarded_with_the_predictions_made_while_it_is_the_last():
    model = two_policies()
    bytes = text_bytes(2, 8)
    actions = jnp.asarray([[1, 0, 1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0, 1]], bool)
    level = predict(model, bytes, actions=(actions,)).levels[0]
    values = jnp.arange(16, dtype=jnp.float32).reshape(2, 8)
    inside = Reward(values, None, jnp.ones((2, 8), jnp.int32)).of_tokens(level, 8)
    np.testing.assert_array_equal(inside.log_prob[0, :4], [0 + 1, 2 + 3 + 4, 5 + 6 + 7, 0])
    np.testing.assert_array_equal(inside.scored, [[2, 3, 3, 0, 0, 0, 0, 0], [1, 6, 1, 0, 0, 0, 0, 0]])
    np.testing.assert_allclose(inside.log_prob.sum(axis=1), values.sum(axis=1))


def test_the_early_head_learns_from_one_level_only():
    both = two_policies((EarlyExit(0.5), Discount(0.9), BatchCentre()))
    bytes = text_bytes(2, 8)

    def gradient(model):
        return jax.jit(jax.grad(lambda m: m.loss(bytes, key=jax.random.key(0)).loss))(model).early_head.weight

    silent = Estimator(WindowedPolicy(8, window=1, target_rate=0.4), Chunker(Select(), Distribute()), NoObjective())
    alone = eqx.tree_at(lambda m: m.stage.inner.estimator, both, silent)
    np.testing.assert_allclose(gradient(both), gradient(alone), rtol=1e-5, atol=1e-8)
    assert np.any(gradient(both) != 0)
    inside = eqx.tree_at(lambda m: m.stage.estimator, both, silent)
    assert np.any(gradient(inside) != 0)


def test_the_loss_of_the_early_head_is_counted_once():
    """Of two levels that need it, the outermost counts it, with its own weight."""
    objectives = [
        ScoreFunctionObjective((EarlyExit(weight),), 0.4, policy_weight=0.0, rate_weight=0.0) for weight in (0.5, 0.25)
    ]
    model = eqx.tree_at(
        lambda m: [one.objective for one in m.stage.estimators], two_policies((EarlyExit(),)), objectives
    )
    output = losses(model, text_bytes(2, 8), key=jax.random.key(0))
    assert output.early_log_prob is not None
    np.testing.assert_allclose(output.loss, -output.log_prob - 0.5 * output.early_log_prob, rtol=1e-5)


def test_layouts_are_read_as_they_are_published():
    networks = read_layout('["m4", ["T1m4", ["T26"], "m4T1"], "m4"]')
    assert (networks.encoder, networks.decoder, networks.depth) == ("mmmm", "mmmm", 2)
    assert networks.inside is not None
    assert networks.inside.encoder == "Tmmmm"
    assert networks.inside.inside is not None
    assert networks.inside.inside.main == "T" * 26
    for wrong, message in {
        "m4": "JSON list",
        '["m4", ["T2"]]': "one or three parts",
        '["m4", "T2", "m4"]': "one or three parts",
        '["4m", ["T2"], "m4"]': "letters of mMtT",
        "[3]": "letters of mMtT",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_layout(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": (32, 32)}, "dims needs 3 numbers"),
        ({"dims": (64, 32, 64)}, "grow inward"),
        ({"dims": (20, 32, 64)}, "multiple of 64"),
        ({"heads": (2, 3, 4)}, "3 heads must divide"),
        ({"rotary_dims": (8, 3, 8)}, "even number"),
        ({"mlp_dims": (0, 0, 32)}, "MLP"),
        ({"state": 0}, "state must be a whole number from 1"),
        ({"windows": (4, -1, 0)}, "windows must be a whole number from 0"),
    ],
)
def test_shapes_that_make_no_model_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_a_shape_wants_as_many_estimators_as_it_has_levels():
    with pytest.raises(ValueError, match="2 token levels; got 1"):
        UNet(SMALL, two_policies().stage.estimator, key=jax.random.key(0))


def test_weights_start_as_released():
    config = dataclasses.replace(nested_config("hnet", "hnet"), unet=dataclasses.replace(SMALL, dims=(128, 128, 192)))
    model = UNet(config.unet, build_estimators(config, jax.random.key(1)), key=jax.random.key(2))
    outer = model.stage
    assert isinstance(outer, Hierarchy)
    stage = outer.inner
    assert isinstance(stage, Hierarchy)
    assert isinstance(stage.inner, Widened)
    assert isinstance(stage.inner.stage, Flat)
    np.testing.assert_array_equal(stage.inner.padding, jnp.zeros(64))
    first, second, main = stage.encoder.blocks[0], stage.encoder.blocks[1], stage.inner.stage.stack.blocks[0]

    def std(linear: Linear | Affine) -> float:
        return float(jnp.std(linear.weight))

    # Two outer layers; three more inside, of which one has an MLP; and the innermost with one.
    for block, residuals in ((outer.encoder.blocks[0], 2), (second, 2 + 4), (first, 2 + 4), (main, 2 + 4 + 2)):
        assert isinstance(block, PreNorm)
        mixer = block.mixer
        if isinstance(mixer, Mamba2):
            into, out = mixer.project_in, mixer.project_out
        else:
            assert isinstance(mixer, Attention)
            into, out = mixer.qkv, mixer.out
        assert std(into) == pytest.approx(0.02, rel=0.05)
        assert std(out) == pytest.approx(0.02 / math.sqrt(residuals), rel=0.05)
    assert isinstance(main, PreNorm)
    assert isinstance(main.mlp, SwiGLU)
    assert std(main.mlp.out) == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    assert std(model.output_head) == pytest.approx(0.02, rel=0.05)
    assert float(jnp.std(model.embedding)) == pytest.approx(1.0, rel=0.05)


# Millions of parameters, as the tables of the papers round them.
SIZES = {
    "hnet-1stage-L": (679.405312, 1e-9),
    "hnet-1stage-XL": (1300, 0.04),
    "hnet-2stage-L": (870, 0.01),
    "hnet-2stage-XL": (1600, 0.01),
    # The paper gives the layers of those for Chinese and code, and no counts: these are ours.
    "hnet-2stage-XL-chinese": (1755.3, 1e-4),
    "hnet-2stage-XL-code": (1654.1, 1e-4),
    "hnet-space-XL-chinese": (1015.5, 1e-3),
    "hnet-space-XL-code": (2078.6, 1e-3),
    "hnet-space-L": (850, 0.01),
    "hnet-pool-L": (850, 0.01),
    "hnet-space-XL": (1600, 0.02),
    "spacebyte++-L": (850, 0.01),
    "spacebyte++-XL": (1600, 0.02),
    "llamabyte-L": (210, 0.025),
    "mambabyte-L": (190, 0.03),
    "dna-transformer": (29, 0.02),
    "dna-mamba": (33, 0.02),
    "dna-hnet": (64, 0.01),
    "dna-hnet-mamba": (66, 0.01),
}


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_published_sizes(name):
    config = PRESETS[name]
    model = eqx.filter_eval_shape(
        lambda key: UNet(config.unet, build_estimators(config, key), key=key), jax.random.key(0)
    )
    millions = sum(leaf.size for leaf in jax.tree.leaves(model) if hasattr(leaf, "size")) / 1e6
    size, tolerance = SIZES[name]
    assert millions == pytest.approx(size, rel=tolerance)


def test_presets_of_the_papers_validate_on_enough_text_and_name_enough_to_train_on():
    small = {name for name in PRESETS if name.endswith("tiny")}
    assert all((run.evaluation.bytes >= 16_000_000) == (name not in small) for name, run in PRESETS.items())
    assert PRESETS["tiny"].evaluation.bytes == PRESETS["hnet-tiny"].evaluation.bytes == 262_144
    data = [run.dataset for name, run in PRESETS.items() if run.bytes == 460_000_000_000 and "dna" not in name]
    chinese, code = "hub:opencsg/Fineweb-Edu-Chinese-V2.1/4_5", "codeparrot-clean"
    assert set(data) == {"fineweb-edu-100BT", chinese, code}
    assert data.count(chinese) == data.count(code) == 2


def test_every_stage_of_a_preset_is_described_by_its_json(tmp_path):
    for name in ("hnet-2stage-XL-code", "hnet-2stage-XL-chinese", "dna-hnet", "mambabyte-L"):
        assert from_json(to_json(PRESETS[name]), "here") == PRESETS[name].resolved


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner_rates": (0.3, 0.3)}, "2 inner levels are named"),
        ({"inner_rates": (1.5,)}, "--inner-rates must be a number from 1e-06"),
        ({"inner_estimators": ("bpe",)}, "bpe reads bytes, not tokens"),
        ({"inner_estimators": ("characters",)}, "characters reads bytes, not tokens"),
        ({"inner_rates": (0.001,)}, "a rate of 0.001 lies beyond policy logits"),
        ({"inner_estimators": ("hnet",), "chunker": "distribute"}, "hnet learns through the probs"),
        ({"inner_estimators": ("gumbel",), "pool": "last"}, "gumbel learns through the relaxed"),
        (
            {"settings": {"isotropic": {"token_level": False}}, "estimator": "isotropic"},
            "leaves out the only level of tokens",
        ),
    ],
)
def test_inner_levels_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        require_fit(dataclasses.replace(nested_config("sfe"), **changes))
    with pytest.raises(ConfigError, match="has no level of tokens"):
        dataclasses.replace(PRESETS["mambabyte-L"], estimator="sfe")


def test_inner_levels_have_room_for_what_they_expect():
    config = dataclasses.replace(nested_config("sfe"), length=1000, capacity_slack=1.5, rate=0.4, inner_rates=(0.5,))
    routers = [estimator.router for estimator in build_estimators(config, jax.random.key(0))]
    assert inner_capacities(config, routers, 600) == (300,)
    assert inner_capacities(config, routers, 200) == (200,)
    assert inner_capacities(config, routers[:1], 600) == ()
    scheduled = dataclasses.replace(config, target=TargetConfig(start=0.8))
    assert inner_capacities(scheduled, routers, 1000) == (600,)


def test_draws_are_those_of_any_level():
    reductions = ("early-exit", "discount", "sample-centre")
    config = nested_config("hnet").with_settings(sfe={"samples": 3, "reductions": reductions})
    assert config.samples == 3
    assert dataclasses.replace(config, inner_estimators=("uniform",)).samples == 1
    model = UNet(config.unet, lively(build_estimators(config, jax.random.key(1))), key=jax.random.key(2))
    output = losses(model, text_bytes(2, LENGTH), key=jax.random.key(0), samples=3)
    assert np.isfinite(output.loss)
    assert float(output.metrics["level1_advantage_rms"]) > 0


def test_a_rule_outside_leaves_the_rewards_inside_as_they_are():
    """It decides nothing, but as many bytes could."""
    model = two_policies()
    bytes = text_bytes(4, 8)
    policies = predict(model, bytes, key=jax.random.key(0), training=True)
    ruled = eqx.tree_at(lambda p: p.levels[0].boundaries.decided, policies, replace_fn=jnp.zeros_like)
    one, other = (model.losses(drawn, plain_layout(bytes)).metrics["level1_policy_loss"] for drawn in (policies, ruled))
    assert float(one) == pytest.approx(float(other), rel=1e-6)


def test_stages_learn_at_the_rates_of_equation_11():
    got = equations.stage_multipliers([3.0, 3.0], [1024, 1024, 1536], 4.6)
    wanted = [math.sqrt(4.6 * 1.5), math.sqrt(4.6 / 3 * 1.5), math.sqrt(4.6 / 9)]
    np.testing.assert_allclose(got, wanted)
    config = dataclasses.replace(nested_config("hnet", "hnet"), length=64)
    settings = dataclasses.replace(config.optimizer, stage_multipliers=4.6, clip=1e9, weight_decay=0.0)
    config = dataclasses.replace(config, optimizer=settings, steps=10)
    model = UNet(config.unet, build_estimators(config, jax.random.key(1)), key=jax.random.key(2))
    params = eqx.filter(model, eqx.is_inexact_array)
    depths = stages_of(params)
    assert depths.embedding == depths.head.weight == depths.stage.encoder.norm.weight == 0
    assert depths.stage.estimator.router.router.query == 0
    assert (
        depths.stage.inner.decoder.norm.weight == depths.stage.inner.estimator.chunker.upsampler.projection.weight == 1
    )
    assert depths.stage.inner.inner.padding == depths.stage.inner.inner.stage.stack.norm.weight == 2
    optimizer = make_optimizer(config, multipliers(config, params))
    ones = jax.tree.map(jnp.ones_like, params)
    state = optimizer.init(params)
    # Optax leaves the promotion of a step's number to jax.
    with jax.numpy_dtype_promotion("standard"):
        _, state = optimizer.update(ones, state, params)
        updates, _ = optimizer.update(ones, state, params)
    each = equations.stage_multipliers([2.0, 2.5], SMALL.dims, 4.6)
    first = jax.tree.leaves(updates)[0].ravel()[0]
    for update, stage in zip(jax.tree.leaves(updates), jax.tree.leaves(depths), strict=True):
        np.testing.assert_allclose(update / first, each[stage] / each[0], rtol=1e-5)


def test_vectors_are_exempt_from_decay_where_asked():
    config = dataclasses.replace(nested_config("hnet", "hnet"), steps=10)
    settings = dataclasses.replace(config.optimizer, weight_decay=0.5, decay="matrices", stage_multipliers=None)
    config = dataclasses.replace(config, optimizer=settings)
    model = UNet(config.unet, build_estimators(config, jax.random.key(1)), key=jax.random.key(2))
    params = eqx.filter(model, eqx.is_inexact_array)
    zeros, optimizer = jax.tree.map(jnp.zeros_like, params), make_optimizer(config)
    with jax.numpy_dtype_promotion("standard"):
        _, state = optimizer.update(zeros, optimizer.init(params), params)
        updates, _ = optimizer.update(zeros, state, params)
    for leaf, update in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True):
        assert bool(jnp.any(update != 0)) == (leaf.ndim > 1 and bool(jnp.any(leaf != 0)))


def test_the_schedule_warms_up_stays_and_decays():
    config = nested_config("hnet")
    settings = dataclasses.replace(config.optimizer, schedule="wsd", learning_rate=2.0, final_fraction=0.1)
    config = dataclasses.replace(config, optimizer=settings, steps=100)
    schedule = make_schedule(config)
    rates = np.asarray([schedule(step) for step in range(101)])
    np.testing.assert_allclose(rates[:11], np.linspace(0, 2, 11), rtol=1e-5)
    np.testing.assert_allclose(rates[10:81], 2.0, rtol=1e-6)
    assert rates[100] == pytest.approx(0.2, rel=1e-5)
    falls = -np.diff(rates[80:])
    assert np.all(falls > 0)
    assert np.all(np.diff(falls) < 0)


def test_training_goes_on_from_weights_of_any_layout(tmp_path):
    model = nested("hnet", "hnet")
    fresh = UNet(SMALL, build_estimators(nested_config("hnet", "hnet"), jax.random.key(3)), key=jax.random.key(4))
    save(model, tmp_path)
    assert eqx.tree_equal(
        eqx.filter(initial_weights(str(tmp_path), fresh), eqx.is_array), eqx.filter(model, eqx.is_array)
    )
    projected = nested_config("hnet", "hnet").with_settings(smooth={"residual": "projected"})
    released = UNet(SMALL, build_estimators(projected, jax.random.key(3)), key=jax.random.key(4))
    (tmp_path / "published").mkdir()
    path = save_hnet(released, tmp_path / "published")
    again = UNet(SMALL, build_estimators(projected, jax.random.key(5)), key=jax.random.key(6))
    assert eqx.tree_equal(
        to_reference(initial_weights(str(path), again))["lm_head.weight"], np.asarray(released.output_head.weight).T
    )
    # The same files by other names: a model's own file, and a folder of the released layout.
    assert eqx.tree_equal(
        initial_weights(str(tmp_path / "model.safetensors"), fresh), initial_weights(str(tmp_path), fresh)
    )
    (tmp_path / "folder").mkdir()
    save_hnet(released, tmp_path / "folder", kind="safetensors")
    found = initial_weights(str(tmp_path / "folder"), again)
    assert eqx.tree_equal(to_reference(found)["lm_head.weight"], np.asarray(released.output_head.weight).T)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if eqx.is_inexact_array(leaf) else leaf, model)
    save(half, tmp_path)
    assert initial_weights(str(tmp_path), fresh).output_head.weight.dtype == jnp.float32
    with pytest.raises(ConfigError, match="a model of other parts than this run's"):
        initial_weights(str(tmp_path), small_model())
    with pytest.raises(LoadError, match=r"there is no file or folder .*none\.pt"):
        initial_weights(str(tmp_path / "none.pt"), fresh)


def test_runs_export_in_the_released_layout_what_it_has_room_for(tmp_path, capsys):
    config = nested_config("hnet", "hnet").with_settings(smooth={"residual": "projected"})
    model = UNet(SMALL, build_estimators(config, jax.random.key(3)), key=jax.random.key(4))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(to_json(config))
    save(model, tmp_path / "run")
    for kind in ("pt", "safetensors"):
        to = tmp_path / kind
        assert export.main([str(tmp_path / "run"), "--to", str(to), "--layout", f"hnet-{kind}"]) == 0
        assert sorted(path.name for path in to.iterdir()) == ["README.md", "model.json", f"model.{kind}"]
        assert "load_hnet" in (to / "README.md").read_text()
        ids = text_bytes(1, 12)
        np.testing.assert_array_equal(predict(load_hnet(to), ids).logits, predict(model, ids).logits)
    save(small_model(), tmp_path / "run")
    assert export.main([str(tmp_path / "run"), "--to", str(tmp_path / "other"), "--layout", "hnet-pt"]) == 2
    assert "released layout has" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "other").exists()
