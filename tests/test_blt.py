"""A whole small Byte Latent Transformer, put together of this library's parts, against the published definition."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from estimators.routers.entropy import next_byte_entropy
from tests import blt_reference as reference
from tests.test_decoding import decode, prefill
from tests.test_entropy import starts_of
from unet.decoding.kv_cache import with_room
from unet.likelihood import plain_layout

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def blt(golden):
    z = golden("blt")
    return {name: z[name] for name in z.files}


@pytest.fixture(scope="module")
def ids(blt):
    return jnp.asarray(blt["input_ids"], jnp.int32)


@pytest.fixture(scope="module")
def model(blt):
    return reference.small_blt(reference.parameters(blt), reference.settings(blt))


@pytest.fixture(scope="module")
def predicted(model, ids):
    return eqx.filter_jit(lambda m: m(ids))(model)


def test_the_patcher_has_the_same_entropies(blt, ids):
    patcher = reference.small_patcher(reference.parameters(blt), reference.settings(blt))
    found = eqx.filter_jit(next_byte_entropy)(patcher, plain_layout(ids))
    np.testing.assert_allclose(found, blt["entropies"], **CLOSE)


def test_tokens_close_where_its_patches_end(blt, predicted):
    for found, lengths in zip(predicted.levels[0].boundaries.actions, blt["patch_lengths"], strict=True):
        assert found.tolist()[:95] == starts_of(lengths, 96)[1:96]


def test_the_logits_are_the_same(blt, predicted):
    np.testing.assert_allclose(predicted.logits, blt["logits"], **CLOSE)


def test_loss_and_every_gradient_are_the_same(blt, ids):
    config = reference.settings(blt)

    @jax.jit
    @jax.value_and_grad
    def loss(arrays):
        logits = reference.small_blt(arrays, config)(ids).logits[:, :-1]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1))

    value, gradients = loss(reference.parameters(blt))
    assert float(value) == pytest.approx(float(blt["loss"]), rel=1e-5)
    listed = {name.removeprefix("grad."): blt[name] for name in blt if name.startswith("grad.")}
    assert len(listed) > 60
    for name, gradient in listed.items():
        np.testing.assert_allclose(
            gradients[name], gradient, rtol=1e-4, atol=1e-4 * np.abs(gradient).max(), err_msg=name
        )
    # The patcher only says where patches end.
    assert not any(jnp.any(leaf) for name, leaf in gradients.items() if name.startswith("model.patcher"))


def test_decoded_in_pieces_it_says_the_same(model, ids, predicted):
    _, state = prefill(model, ids, [3, 40], None)
    state, here = with_room(state, 96), np.asarray([3, 40])[:, None]
    for width in (7, *[1] * 17):
        place, every = here + np.arange(width), np.arange(2)[:, None]
        got, state = decode(model, ids[every, place], state, jnp.full(2, width))
        np.testing.assert_allclose(got.logits, predicted.logits[every, place], **CLOSE)
        closed = predicted.levels[0].boundaries.actions
        np.testing.assert_array_equal(got.levels[0].boundaries.actions, closed[every, place])
        here = here + width
