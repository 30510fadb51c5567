"""The model: attention, presets, dtypes, memory."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config.build import build_estimator
from experiments.config.presets import PRESETS
from tests.conftest import predict, small_model, small_score_function, text_bytes
from unet import Chunker, Deviation, Distribute, Select, UNet, UNetConfig, next_logprobs
from unet.attention import Visibility, attend
from unet.hierarchy import Flat, Hierarchy
from unet.likelihood import plain_layout
from unet.losses import Prediction, early_log_prob


@eqx.filter_jit
def forward(model, bytes, actions=()):
    return model(bytes, actions=actions)


def dense_attention(query, key, value, layout, window, cap):
    """Attention over the whole square, masked: what the block-local form must equal."""
    length = query.shape[1]
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    logits = cap * jnp.tanh(logits / cap)
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    seen = (distance >= 0) & (distance < (window or length))
    same = (
        (layout.segments[:, :, None] == layout.segments[:, None, :]) & layout.mask[:, :, None] & layout.mask[:, None, :]
    )
    seen = (seen & same) | (distance == 0)
    weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


@pytest.mark.parametrize("window", [None, 1, 4, 7, 20, 64])
@pytest.mark.parametrize("length", [1, 5, 20, 23])
def test_block_local_attention_equals_the_masked_square(window, length):
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, (2, length, 2, 4)) for k in keys)
    segments = jnp.zeros((2, length), jnp.int32).at[1, length // 2 :].set(1)
    mask = jnp.ones((2, length), bool).at[0, length - length // 4 :].set(False)
    layout = plain_layout(jnp.zeros((2, length), jnp.int32), segments, mask)
    got = jax.jit(lambda q, k, v: attend(q, k, v, Visibility(layout, window), cap=5.0))(query, key, value)
    np.testing.assert_allclose(got, dense_attention(query, key, value, layout, window, 5.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [9, 16, 23])
def test_full_attention_in_turns_equals_the_square_in_value_and_gradient(length, monkeypatch):
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, weight = (jax.random.normal(k, (2, length, 2, 4)) for k in keys)
    segments = jnp.zeros((2, length), jnp.int32).at[1, length // 2 :].set(1)
    mask = jnp.ones((2, length), bool).at[0, length - length // 4 :].set(False)
    layout = plain_layout(jnp.zeros((2, length), jnp.int32), segments, mask)

    def both():
        def scored(q, k, v):
            mixed = attend(q, k, v, Visibility(layout, None), cap=5.0)
            return jnp.sum(mixed * weight), mixed

        return jax.jit(jax.value_and_grad(scored, argnums=(0, 1, 2), has_aux=True))(query, key, value)

    square = both()
    monkeypatch.setattr("unet.attention.BLOCK_QUERIES", 8)
    in_turns = both()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), in_turns, square)


@pytest.mark.parametrize("window", [16, None])
def test_attention_needs_memory_in_proportion_to_length(window):
    def bytes_at(length):
        shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        layout = plain_layout(jnp.zeros((1, length), jnp.int32))

        def scored(q, k, v):
            return jnp.sum(attend(q, k, v, Visibility(layout, window), cap=50.0))

        compiled = jax.jit(jax.grad(scored, argnums=(0, 1, 2))).lower(shape, shape, shape)
        analysis = compiled.compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert bytes_at(8192) < 2.5 * bytes_at(4096)


def test_log_likelihoods_are_those_of_the_next_byte():
    logits, bytes = jax.random.normal(jax.random.key(0), (2, 6, 256)), text_bytes(2, 6)
    got = next_logprobs(logits, bytes)
    expected = jax.nn.log_softmax(logits)[jnp.arange(2)[:, None], jnp.arange(5)[None, :], bytes[:, 1:]]
    np.testing.assert_allclose(got[:, :-1], expected, rtol=1e-5)
    assert not jnp.any(got[:, -1])


def test_an_early_head_on_some_rows_has_their_mean_at_the_others():
    bytes, rows = text_bytes(2, 6), jnp.asarray([4, 1, 5])
    layout = plain_layout(bytes)
    logits = jax.random.normal(jax.random.key(0), (2, 6, 256))
    everywhere = Prediction(logits, logits, ())
    somewhere = Prediction(logits, logits[:, rows], (), rows)
    full = next_logprobs(logits, bytes)
    np.testing.assert_array_equal(early_log_prob(everywhere, layout), full)
    got = early_log_prob(somewhere, layout)
    assert got is not None
    # Row 5 is the last, which predicts nothing.
    mean = jnp.mean(full[:, jnp.asarray([4, 1])])
    np.testing.assert_allclose(got[:, jnp.asarray([4, 1])], full[:, jnp.asarray([4, 1])], rtol=1e-6)
    np.testing.assert_allclose(got[:, jnp.asarray([0, 2, 3])], jnp.full((2, 3), mean), rtol=1e-6)
    np.testing.assert_allclose(jnp.mean(got[:, :5]), mean, rtol=1e-6)


def test_the_share_of_the_early_head_changes_neither_what_it_learns_on_average_nor_the_rest():
    config = UNetConfig(16, 2, 1, 1, 1, window=4)
    key = jax.random.key(0)
    models = [
        UNet(dataclasses.replace(config, early_exit_fraction=share), small_score_function(), key=key)
        for share in (1.0, 0.5)
    ]

    @eqx.filter_jit
    def early_gradient(model, key):
        def early(head):
            output = eqx.tree_at(lambda model: model.early_head, model, head).loss(text_bytes(2, 16), key=key)
            return output.early_log_prob, output.log_prob

        return eqx.filter_grad(early, has_aux=True)(model.early_head)

    whole, log_prob = early_gradient(models[0], jax.random.key(1))
    parts = [early_gradient(models[1], jax.random.key(seed)) for seed in range(1, 161)]
    np.testing.assert_array_equal(log_prob, parts[0][1])
    mean = jnp.mean(jnp.stack([gradient.weight for gradient, _ in parts]), axis=0)
    distance = jnp.linalg.norm(mean - whole.weight) / jnp.linalg.norm(whole.weight)
    one = jnp.linalg.norm(parts[0][0].weight - whole.weight) / jnp.linalg.norm(whole.weight)
    assert distance < 0.15 < one
    with pytest.raises(ValueError, match="early_exit_fraction"):
        dataclasses.replace(config, early_exit_fraction=0.0)


def test_samples_of_a_sequence_share_one_pass_of_the_early_head():
    model, bytes, key = small_model(small_score_function()), text_bytes(2, 16), jax.random.key(1)
    one, three = (predict(model, bytes, key=key, samples=samples).early_logits for samples in (1, 3))
    assert one is not None
    assert three is not None
    np.testing.assert_allclose(three, one, rtol=1e-5, atol=1e-6)

    def of_the_early_head(samples):
        def early(model):
            return model.loss(bytes, key=key, samples=samples).early_log_prob

        value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(early))(model)
        return value, gradient.early_head.weight, gradient.embedding

    jax.tree.map(
        lambda one, three: np.testing.assert_allclose(one, three, rtol=1e-4, atol=1e-7),
        of_the_early_head(1),
        of_the_early_head(3),
    )


SIZES = {"18M": 18, "32M": 32, "73M": 73, "90M": 90, "130M": 130, "147M": 147}


@pytest.mark.parametrize("name", [*SIZES, "tiny", "346M"])
def test_presets_have_the_parameters_that_their_names_say(name):
    config = PRESETS[name]
    model = eqx.filter_eval_shape(
        lambda key: UNet(config.unet, build_estimator(config, key), key=key), jax.random.key(0)
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, lambda leaf: hasattr(leaf, "size"))))
    if name == "tiny":
        assert 0.3e6 < count < 0.45e6
    elif name == "346M":
        # The layers given for it (2/20/2 at width 1024) come to 5 % more than its name.
        assert count == pytest.approx(365.7e6, rel=0.005)
    else:
        assert count == pytest.approx(1e6 * SIZES[name], rel=0.04)


def test_the_early_head_starts_as_a_copy_of_the_output_head():
    model = small_model(small_score_function())
    assert model.early_head is not None
    np.testing.assert_array_equal(model.early_head.weight, model.output_head.weight)
    assert small_model(small_score_function(())).early_head is None


def test_without_a_token_level_there_is_one_flat_stack():
    model = small_model(None)
    assert isinstance(model.stage, Flat)
    prediction = forward(model, text_bytes(2, 9))
    assert prediction.levels == ()
    output = model.losses(prediction, plain_layout(text_bytes(2, 9)))
    assert (output.rate, output.overflow, output.padding) == (0.0, 0.0, 0.0)


def test_bfloat16_computes_near_float32_and_keeps_losses_wide():
    bytes = text_bytes(2, 32)
    models = [
        UNet(UNetConfig(16, 2, 1, 1, 1, window=4, compute=compute), small_score_function(), key=jax.random.key(0))
        for compute in ("float32", "bfloat16")
    ]
    actions = jnp.zeros((2, 32), bool).at[:, ::4].set(True)
    wide, narrow = (forward(model, bytes, (actions,)) for model in models)
    assert narrow.levels[0].hidden.dtype == jnp.bfloat16
    assert narrow.logits.dtype == jnp.float32
    assert narrow.levels[0].boundaries.logits.dtype == jnp.float32
    np.testing.assert_allclose(narrow.logits, wide.logits, atol=0.15)
    loss, gradient = eqx.filter_jit(eqx.filter_value_and_grad(lambda m: m.loss(bytes, key=jax.random.key(0)).loss))(
        models[1]
    )
    assert loss.dtype == jnp.float32
    assert gradient.head.weight.dtype == jnp.float32


def test_rematerialised_blocks_give_the_same_gradients():
    def gradient(remat):
        model = UNet(UNetConfig(16, 2, 1, 2, 1, window=4, remat=remat), small_score_function(), key=jax.random.key(0))
        return eqx.filter_jit(eqx.filter_grad(lambda m: m.loss(text_bytes(2, 16), key=jax.random.key(1)).loss))(model)

    for a, b in zip(jax.tree.leaves(gradient(False)), jax.tree.leaves(gradient(True)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_deviation_chunker_adds_only_what_the_token_level_changed():
    estimators = [small_score_function() for _ in range(2)]
    estimators[1] = eqx.tree_at(lambda e: e.chunker, estimators[1], Chunker(Select(), Deviation()))
    assert estimators[0].chunker == Chunker(Select(), Distribute())
    plain, deviating = (small_model(estimator, main_layers=0) for estimator in estimators)
    bytes, everywhere = text_bytes(1, 8), (jnp.ones((1, 8), bool),)
    assert not np.allclose(forward(plain, bytes, everywhere).logits, forward(deviating, bytes, everywhere).logits)
    # With no token-level block nothing changes there: the deviation is zero wherever the boundaries are.
    sparse = (jnp.zeros((1, 8), bool).at[0, 0].set(True),)
    np.testing.assert_allclose(
        forward(deviating, bytes, everywhere).logits, forward(deviating, bytes, sparse).logits, atol=1e-5
    )


def test_token_rows_take_the_byte_position_or_their_own_number():
    bytes, actions = text_bytes(1, 8), jnp.zeros((1, 8), bool).at[0, jnp.array([0, 3, 6])].set(True)
    seen = []
    for positions in ("byte", "chunk"):
        config = UNetConfig(16, 2, 1, 1, 1, window=4, token_positions=positions)
        model = UNet(config, small_score_function(), key=jax.random.key(0))
        layout = plain_layout(bytes)
        assert isinstance(model.stage, Hierarchy)
        hidden = model.embed(layout)
        rows = model.stage.estimator.chunker.down(
            hidden, forward(model, bytes, (actions,)).levels[0].boundaries, capacity=3
        ).tokens
        seen.append(model.stage.token_layout(rows, layout).positions[0].tolist())
    assert seen == [[0, 3, 6], [0, 1, 2]]


@pytest.mark.parametrize(
    "changes", [{"dim": 15}, {"heads": 3}, {"window": 0}, {"main_layers": -1}, {"dim": 6, "heads": 2}]
)
def test_impossible_shapes_are_refused(changes):
    with pytest.raises(ValueError, match=r"must|cannot"):
        UNetConfig(**{"dim": 16, "heads": 2, "encoder_layers": 1, "main_layers": 1, "decoder_layers": 1} | changes)
