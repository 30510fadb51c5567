"""Models in H-Net's released layout: against what the released program computed, and back."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import CosineRouter, DynamicChunking
from estimators import equations as eq
from estimators.base import Layout
from tests.compositions import LENGTH
from tests.conftest import losses, predict, small_model, small_score_function
from tests.test_decoding import check_in_pieces
from unet import Chunker, Hierarchy, Projection, Select, Smooth, UNet, from_reference, to_reference
from unet.blocks import Stack
from unet.files.hnet_layout import new_hnet, reference_config
from unet.files.published import LayoutError, shape_of
from unet.hierarchy import StageSampling
from unet.likelihood import next_logprobs, plain_layout

VALUES = {"rtol": 1e-5, "atol": 1e-6}
GRADIENTS = {"rtol": 1e-4, "atol": 1e-7}
NAMES = ("hnet_1stage", "hnet_2stage")


def read(golden, name):
    z = golden(name)
    return z, json.loads(str(z["config"])), {key[6:]: z[key] for key in z.files if key.startswith("param.")}


@pytest.fixture(scope="module", params=NAMES)
def released(request, golden):
    z, config, params = read(golden, request.param)
    stages = len(config["d_model"]) - 1
    return z, config, params, from_reference(config, params, chunk_sizes=[3.0] * stages)


def test_logits_and_boundaries_of_every_stage_are_the_released_ones(released):
    z, _, _, model = released
    prediction = predict(model, jnp.asarray(z["input_ids"]))
    np.testing.assert_allclose(prediction.logits, z["logits"], **VALUES)
    for stage, level in enumerate(prediction.levels):
        rows = z[f"boundary_prob.{stage}"].shape[1]
        mask = np.asarray(level.layout.mask[:, :rows])
        assert mask.sum() == level.layout.mask.sum()
        np.testing.assert_allclose(level.boundaries.probs[:, :rows][mask], z[f"boundary_prob.{stage}"][mask], **VALUES)
        drawn = np.asarray(level.boundaries.actions[:, :rows])
        np.testing.assert_array_equal(drawn[mask], z[f"boundary_mask.{stage}"][mask])


def test_released_models_step_as_they_read_in_ragged_batches(released):
    check_in_pieces(released[3], (1, 9, LENGTH - 1), keys=None)


def test_losses_are_the_released_ones(released):
    z, _, _, model = released
    output = losses(model, jnp.asarray(z["input_ids"]), key=None)
    assert -float(output.log_prob) == pytest.approx(float(z["loss"]), rel=1e-6)
    assert float(output.metrics["ratio_loss"]) == pytest.approx(float(z["ratio_loss_N3.0"]), rel=1e-5)
    total = float(z["loss"])
    for stage in range(len(model.stage.estimators)):
        ours = float(output.metrics[f"level{stage}_ratio_loss" if stage else "ratio_loss"])
        assert ours == pytest.approx(ratio_of_tokens(z, stage), rel=1e-5)
        total += 0.03 * ours
    assert float(output.loss) == pytest.approx(total, rel=1e-6)


def ratio_of_tokens(z, stage):
    """From the released probabilities, over the rows that hold tokens."""
    probs, drawn = jnp.asarray(z[f"boundary_prob.{stage}"]), jnp.asarray(z[f"boundary_mask.{stage}"])
    mask = jnp.ones(drawn.shape, bool)
    if stage:
        mask = jnp.arange(drawn.shape[1]) < z[f"boundary_mask.{stage - 1}"].sum(axis=1)[:, None]
    return float(eq.ratio_loss(drawn, probs, 3.0, mask))


def test_gradients_of_one_stage_are_the_released_ones(golden):
    z, config, params = read(golden, "hnet_1stage")
    model = from_reference(config, params, chunk_sizes=[3.0])
    gradient = jax.jit(jax.grad(lambda m: m.loss(jnp.asarray(z["input_ids"]), key=None).loss))(model)
    check_gradients(z, gradient)


def check_gradients(z, gradient):
    named = to_reference(gradient)
    names = [name[5:] for name in z.files if name.startswith("grad.")]
    assert len(names) > 5
    for name in names:
        np.testing.assert_allclose(named[name], z[f"grad.{name}"], err_msg=name, **GRADIENTS)


def released_loss(model, ids, rows):
    """The loss as the released program takes it on a padded batch. At inner stages it fills the rows behind a sequence's last
    token with rows that close none, and counts them in the ratio loss; sequences side by side without padding, as in training,
    have no such rows, and neither has our loss."""
    layout, sampling = plain_layout(ids), StageSampling()
    outer = model.stage
    encoded = outer.encoder(model.embed(layout), layout).hidden
    drawn = outer.boundaries(encoded, layout, sampling)
    order = jnp.argsort(~drawn.actions, axis=1, stable=True)[:, :rows]
    count = jnp.sum(drawn.actions, axis=1)[:, None]
    tokens = outer.estimator.chunker.down(encoded, drawn, capacity=rows).tokens
    number = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), order.shape)
    filled = Layout(layout.bytes[:, :rows], number, jnp.zeros_like(number), jnp.ones(number.shape, bool))
    inner = outer.inner
    hidden = inner.encoder(jnp.take_along_axis(encoded, order[..., None], axis=1), filled).hidden
    routed = inner.boundaries(hidden, filled, sampling)
    there = jnp.arange(rows) < count
    kept = dataclasses.replace(routed, actions=routed.actions & there)
    chunks = inner.estimator.chunker.down(hidden, kept, capacity=rows).tokens
    main = inner.inner(chunks.values, inner.token_layout(chunks, filled), sampling.inner()).hidden
    back = inner.decoder(inner.estimator.chunker.up(main, chunks, hidden, kept).hidden, filled).hidden
    joined = outer.estimator.chunker.up(back, tokens, encoded, drawn).hidden
    logits = model.logits(outer.decoder(joined, layout).hidden)
    loss = -jnp.mean(next_logprobs(logits, ids)[:, :-1])
    first = eq.ratio_loss(drawn.actions, drawn.probs, 3.0)
    return loss + 0.03 * (first + eq.ratio_loss(kept.actions, routed.probs, 3.0))


def test_gradients_of_two_stages_are_the_released_ones(golden):
    z, config, params = read(golden, "hnet_2stage")
    model = from_reference(config, params, chunk_sizes=[3.0, 3.0])
    rows = z["boundary_prob.1"].shape[1]
    ids = jnp.asarray(z["input_ids"])
    loss, gradient = jax.jit(jax.value_and_grad(lambda m: released_loss(m, ids, rows)))(model)
    assert float(loss) == pytest.approx(float(z["total_loss"]), rel=1e-6)
    check_gradients(z, gradient)


def test_parameters_come_back_as_they_went_in(released):
    _, config, params, model = released
    back = to_reference(model)
    assert back.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name, strict=True)
    written = reference_config(model)
    # What attention would be like in stages that have none leaves no trace in a model.
    for key in ("arch_layout", "d_model", "d_intermediate", "vocab_size", "ssm_cfg", "tie_embeddings"):
        assert written[key] == config[key]
    again = from_reference(written, back, chunk_sizes=[3.0] * (len(config["d_model"]) - 1))
    assert eqx.tree_equal(again, model)


def test_half_precision_keeps_recurrences_routers_and_residuals_wide(golden):
    z, config, params = read(golden, "hnet_2stage")
    model = from_reference(config, params, dtype="bfloat16")
    kinds = {name: value.dtype for name, value in to_reference(model).items()}
    wide = {name for name, kind in kinds.items() if kind == np.float32}
    ends = {name.split(".", 2)[-1].rsplit("mixer.", 1)[-1] for name in wide}
    assert {"A_log", "D", "dt_bias"} <= ends
    assert all(kinds[name] == jnp.bfloat16 for name in ("embeddings.weight", "backbone.encoder.rmsnorm.weight"))
    prediction = predict(model, jnp.asarray(z["input_ids"]))
    assert prediction.logits.dtype == jnp.float32
    np.testing.assert_allclose(prediction.logits[:, :4], z["logits"][:, :4], atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, p: p.pop("lm_head.weight"), "1 missing .such as lm_head.weight."),
        (lambda c, p: p.update(extra=np.zeros(3, np.float32)), "1 unknown .such as extra."),
        (lambda c, p: p.update({"lm_head.weight": np.zeros((3, 64), np.float32)}), r"has shape \[3, 64\]"),
        (lambda c, p: p.update({"lm_head.weight": np.zeros((256, 64), np.int32)}), "is int32"),
        (lambda c, p: c.update(tie_embeddings=True), "tie_embeddings is true, but lm_head"),
        (lambda c, p: c.update(tie_embeddings="no"), "tie_embeddings must be true or false; got 'no'"),
        (lambda c, p: c["ssm_cfg"].update(d_head=32), "ssm_cfg has d_head, which the released code does not know"),
        (lambda c, p: c["attn_cfg"].update(cap=[5, 5]), "attn_cfg has cap, which the released"),
        (lambda c, p: c.update(vocab_size=300), "vocab_size must be 256, .*got 300"),
        (lambda c, p: c.pop("ssm_cfg"), "ssm_cfg is missing"),
        (lambda c, p: c.pop("d_model"), "d_model is missing"),
        (lambda c, p: c["attn_cfg"].pop("window_size"), "window_size is missing"),
        (lambda c, p: c.update(ssm_cfg=[4, 2]), r"ssm_cfg must be an object with settings; got \[4, 2\]"),
        (lambda c, p: c.update(attn_cfg=None), "attn_cfg must be an object with settings; got None"),
        (lambda c, p: c.update(arch_layout=["m2", "T2", "m2"]), "a stage of a layout must be a list"),
        (lambda c, p: c.update(arch_layout=["m2", ["X2"], "m2"]), "letters of mMtT"),
        (lambda c, p: c.update(arch_layout=["m99999999", ["T2"], "m2"]), "at most 4096 layers"),
        (lambda c, p: c["ssm_cfg"].update(d_state=[[16], [16]]), "d_state must be a whole number"),
        (lambda c, p: c["ssm_cfg"].update(d_state={}), "d_state must be a whole number"),
        (lambda c, p: c.update(d_model=[64]), "dims needs 2 numbers"),
        (lambda c, p: c.update(d_model=[64, 32]), "grow inward"),
        (lambda c, p: c.update(d_intermediate=[0, 0]), "layers with an MLP"),
        (lambda c, p: c["attn_cfg"].update(num_heads=[4, 5]), "5 heads must divide"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(golden, change, message):
    _, config, params = read(golden, "hnet_1stage")
    change(config, params)
    with pytest.raises(LayoutError, match=message):
        from_reference(config, params)


def test_configurations_mean_what_the_released_program_makes_of_them(golden):
    _, config, _ = read(golden, "hnet_2stage")
    for given, wide in (([0, 100, None], (0, 128, 256)), ([None, 129, 1], (256, 256, 128)), (256, (256, 256, 256))):
        assert shape_of({**config, "d_intermediate": given}).mlp_dims == wide
    least = {**config, "ssm_cfg": {}, "attn_cfg": {"num_heads": 4, "rotary_emb_dim": 8, "window_size": -1}}
    shape = shape_of({name: value for name, value in least.items() if name not in ("tie_embeddings", "vocab_size")})
    assert (shape.state, shape.conv_width, shape.expand, shape.tie_embeddings) == (128, 4, 2, False)
    assert (shape.heads, shape.rotary_dims, shape.windows) == ((4, 4, 4), (8, 8, 8), (0, 0, 0))
    # Stages without attention may say anything of it, and networks have no layer at all.
    attn = {"num_heads": [0, 4, 4], "rotary_emb_dim": [7, 8, 8], "window_size": [-1, 2, 2]}
    bare = shape_of({**config, "attn_cfg": attn, "arch_layout": ["m1", ["", ["T1"], "m0"], "m1"]})
    skeleton = eqx.filter_eval_shape(new_hnet, bare)
    assert reference_config(skeleton)["arch_layout"] == ["m1", ["", ["T1"], ""], "m1"]


def test_mlps_of_widths_that_the_released_program_has_not_are_filled_with_zeros(golden):
    z, config, _ = read(golden, "hnet_1stage")
    narrow = dataclasses.replace(shape_of(config), mlp_dims=(0, 96))
    model = new_hnet(narrow)
    params, written = to_reference(model), reference_config(model)
    assert written["d_intermediate"] == [0, 128]
    first, second = (
        params[f"backbone.main_network.main_network.layers.0.mlp.{name}.weight"] for name in ("fc1", "fc2")
    )
    assert first.shape == (256, 96)
    assert second.shape == (96, 128)
    assert not np.any(first[96:128])
    assert not np.any(first[224:])
    assert not np.any(second[:, 96:])
    wide = from_reference(written, params)
    ids = jnp.asarray(z["input_ids"][:1, :12])
    np.testing.assert_allclose(predict(wide, ids).logits, predict(model, ids).logits, rtol=1e-5, atol=1e-6)


def test_models_of_other_parts_have_no_released_layout(golden):
    with pytest.raises(LayoutError, match="no norm before the head"):
        to_reference(small_model(small_score_function()))
    _, config, _ = read(golden, "hnet_1stage")
    shape = shape_of(config)
    model = from_reference(*read(golden, "hnet_1stage")[1:])
    assert isinstance(model.stage, Hierarchy)
    encoder = model.stage.encoder
    encoder = Stack(encoder.blocks, window=encoder.window, norm=encoder.norm, rotary_base=5e5)
    rotated = eqx.tree_at(lambda m: m.stage.encoder, model, encoder)
    with pytest.raises(LayoutError, match="base 10000, not 500000"):
        to_reference(rotated)
    with pytest.raises(LayoutError, match="draw boundaries by cosine"):
        to_reference(UNet(shape, small_score_function((), dim=64), key=jax.random.key(0)))


@pytest.mark.parametrize(
    "change",
    [{"smoothing": False}, {"weighting": "confidence"}, {"positions": "byte"}, {"draws": True}],
    ids=str,
)
def test_what_the_released_program_would_compute_otherwise_has_no_released_layout(golden, change):
    _, config, _ = read(golden, "hnet_1stage")
    dim = config["d_model"][0]
    settings = {name: value for name, value in change.items() if name in ("smoothing", "weighting")}
    estimator = DynamicChunking(dim, chunker=Chunker(Select(), Smooth(Projection(dim), **settings)), target_rate=0.2)
    if "draws" in change:
        estimator = eqx.tree_at(lambda e: e.router, estimator, CosineRouter(dim))
    shape = dataclasses.replace(shape_of(config), token_positions=change.get("positions", "chunk"))
    with pytest.raises(LayoutError, match="stages of the released layout"):
        to_reference(UNet(shape, estimator, key=jax.random.key(0)))
