"""Byte Latent Transformers: the golden one against the published definition, and compositions with other parts."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators import Entropy, EntropyRouter, Estimator, NoObjective, RiseRule, RuleRouter
from estimators.constraints import MaxLength, constrained
from estimators.routers import Constrained
from estimators.routers.entropy import next_byte_entropy
from estimators.routers.rules import whitespace
from tests.test_entropy import starts_of
from unet import (
    AttentionPool,
    BLTConfig,
    Chunker,
    LeaveToDecoder,
    UNet,
    from_blt_ids,
    from_reference,
    generate,
    reference_config,
    score,
    to_blt_ids,
    to_reference,
)
from unet.attention import Attention
from unet.blocks import PreNorm, Stack
from unet.blt import MARKS, PUBLISHED_IDS
from unet.decoding.generate import DecodeSettings, DecodeState, allowed_symbols
from unet.decoding.sampling import Sampling
from unet.files.blt_layout import patcher_of, router_of
from unet.files.errors import LayoutError
from unet.likelihood import plain_layout

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def blt(golden):
    z = golden("blt")
    return {name: z[name] for name in z.files}


@pytest.fixture(scope="module")
def config(blt):
    return json.loads(str(blt["config"]))


@pytest.fixture(scope="module")
def params(blt):
    return {name.removeprefix("param."): blt[name] for name in blt if name.startswith("param.")}


@pytest.fixture(scope="module")
def bytes(blt):
    return jnp.asarray(from_blt_ids(blt["input_ids"]))


@pytest.fixture(scope="module")
def model(config, params):
    return from_reference(config, params)


@pytest.fixture(scope="module")
def predicted(model, bytes):
    return eqx.filter_jit(lambda m: m(bytes))(model)


def test_bytes_have_their_published_ids_and_other_marks_too():
    assert to_blt_ids(np.array([0, 253, 254, 255])).tolist() == [4, 257, 1, 2]
    every = np.arange(MARKS)
    np.testing.assert_array_equal(from_blt_ids(to_blt_ids(every)), every)
    assert sorted(PUBLISHED_IDS) == every.tolist()
    with pytest.raises(ValueError, match="ids lie between 0 and 259; got 3 … 260"):
        from_blt_ids(np.array([3, 260]))


def test_the_patcher_has_the_same_entropies(blt, bytes, model):
    found = eqx.filter_jit(next_byte_entropy)(patcher_of(model), plain_layout(bytes))
    np.testing.assert_allclose(found, blt["entropies"], **CLOSE)


def test_tokens_close_where_its_patches_end(blt, predicted):
    for found, lengths in zip(predicted.levels[0].boundaries.actions, blt["patch_lengths"], strict=True):
        assert found.tolist()[:95] == starts_of(lengths, 96)[1:96]


def test_the_logits_are_the_same(blt, predicted):
    np.testing.assert_allclose(predicted.logits, blt["logits"][..., PUBLISHED_IDS], **CLOSE)


def test_loss_and_every_gradient_are_the_same(blt, bytes, model):
    compute = eqx.filter_jit(eqx.filter_value_and_grad(lambda m: m.loss(bytes, key=None).loss))
    value, gradient = compute(model)
    assert float(value) == pytest.approx(float(blt["loss"]), rel=1e-5)
    ours = to_reference(gradient)
    listed = {name.removeprefix("grad."): blt[name] for name in blt if name.startswith("grad.")}
    assert len(listed) > 60
    for name, theirs in listed.items():
        np.testing.assert_allclose(ours[name], theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max(), err_msg=name)
    # The patcher only says where patches end.
    assert not any(np.any(ours[name]) for name in ours if name.startswith("model.patcher"))


def test_parameters_and_configuration_come_back_as_they_were(config, params, model):
    back = to_reference(model)
    assert back.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    written = reference_config(model)
    for name, value in written.items():
        if isinstance(value, dict):
            theirs = {one: config[name].get(one, "none") for one in value}
            assert value == theirs | {"max_position_embeddings": value["max_position_embeddings"]}
        elif name in config and name not in ("architectures", "dtype", "bos_token_id", "eos_token_id"):
            assert value == config[name], name


SHAPE = BLTConfig(
    dims=(8, 12),
    layers=(1, 1, 2),
    heads=(4, 2, 4),
    kv_heads=(2, 1, 2),
    mlp_dims=(12, 16, 12),
    windows=(5, 0, 5),
    rotary_bases=(1e3, 1e2, 1e3),
    epsilons=(1e-5, 1e-3, 1e-4),
    ngrams=(2, 4),
    ngram_buckets=37,
    attend_vectors=2,
)
"""Heads that share keys and values, and tokens of another width."""


def chunker(width=12):
    return Chunker(AttentionPool(8, 4, vectors=2, width=width, kv_heads=2, key=jax.random.key(3)), LeaveToDecoder())


def composed(width=12):
    estimator = Estimator(RuleRouter(whitespace, 0), chunker(width), NoObjective())
    return UNet(SHAPE, constrained(estimator, [MaxLength(3)]), key=jax.random.key(4))


def with_own_patches(model):
    """The golden model with patches of at most five bytes, where entropies rise."""
    router = router_of(model)
    rising = Constrained(EntropyRouter(router.model(), RiseRule(0.05), target_rate=0.3), (MaxLength(5),))
    chunker = model.stage.estimator.chunker
    return eqx.tree_at(lambda m: m.stage.estimator, model, Estimator(rising, chunker, NoObjective()))


@pytest.mark.parametrize("kind", ["own patches", "white space"])
def test_ragged_batches_generate_what_a_whole_pass_scores(kind, model):
    made = with_own_patches(model) if kind == "own patches" else composed()
    prompts = [b"one two", b"", b"a longer prompt, of three chunks"]
    texts = generate(made, prompts, max_bytes=12, key=jax.random.key(5), endless=True, chunk=12).texts
    pieces = [text.piece.bytes for text in texts]
    assert [len(piece) for piece in pieces] == [12, 12, 12]
    scored = score(made, pieces, contexts=prompts, key=None, batch=3)
    for text, one in zip(texts, scored, strict=True):
        np.testing.assert_allclose(text.piece.logprobs, one.logprobs, **CLOSE)
        np.testing.assert_array_equal(text.piece.boundaries, one.boundaries)
    assert 0 < np.mean([text.piece.boundaries for text in texts]) < 1


def test_marks_that_are_no_bytes_are_read_and_never_drawn(model):
    logits, one = jnp.zeros((1, MARKS)), jnp.zeros((1,), jnp.int32)
    state = DecodeState(model.init_state(1), logits, jax.random.split(jax.random.key(0), 1), one + 4, one, one > 0)
    for valid in (False, True):
        allowed = allowed_symbols(state, DecodeSettings(model, model.alphabet, Sampling(), valid, False, 4))[0]
        assert allowed.shape == (MARKS,)
        assert not allowed[256:].any()
        assert bool(allowed[255])
    with pytest.raises(ValueError, match="between 0 and 259; got 260"):
        model(jnp.asarray([[254, 260]]))


def test_heads_that_share_keys_and_values_are_heads_with_equal_ones():
    few, many = (Attention(8, 4, cap=None, kv_heads=n, key=jax.random.key(n)) for n in (2, 4))
    query, key, value = jnp.split(few.qkv.weight, (8, 12), axis=1)
    twice = [jnp.repeat(one.reshape(8, 2, 2), 2, axis=1).reshape(8, 8) for one in (key, value)]
    many = eqx.tree_at(lambda one: (one.qkv.weight, one.out), many, (jnp.concatenate([query, *twice], axis=1), few.out))
    x = jax.random.normal(jax.random.key(0), (1, 6, 8), jnp.float32)
    layout = plain_layout(jnp.zeros((1, 6), jnp.int32))
    ours, theirs = (Stack([PreNorm(8, one, None)])(x, layout).hidden for one in (few, many))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_the_layout_has_no_room_for_is_named():
    with pytest.raises(LayoutError, match="entropies of a byte model make the patches; this model has a RuleRouter"):
        to_reference(composed())
    router = EntropyRouter(composed(), RiseRule(0.1), target_rate=0.2)
    with pytest.raises(LayoutError, match="model of the entropies has PreNorm layers"):
        to_reference(UNet(SHAPE, Entropy(router, chunker=chunker()), key=jax.random.key(0)))
    with pytest.raises(ValueError, match="tokens are 16 wide, but the main network 12"):
        composed(width=None)
