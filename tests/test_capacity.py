"""Sizes chosen while a program runs: the same losses and gradients as with one size, in as few rows as will do."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config.build import build_estimator
from experiments.config.settings import RunConfig
from tests.conftest import losses, small_model, small_score_function, text_bytes
from unet import UNet, UNetConfig
from unet.capacity import smallest_with_room, switch_with_gradient
from unet.hierarchy import StageSampling
from unet.likelihood import plain_layout

SHAPE = UNetConfig(dim=16, heads=2, encoder_layers=1, main_layers=1, decoder_layers=1, window=4)


@pytest.mark.parametrize(("needed", "which"), [(0, 0), (4, 0), (5, 1), (8, 1), (9, 2), (16, 2), (17, 2)])
def test_the_smallest_size_with_room_is_taken(needed, which):
    assert smallest_with_room(jnp.asarray(needed), (4, 8, 16)) == which


def test_the_gradient_is_that_of_the_way_that_was_taken():
    def way(power):
        return lambda x: (jnp.sum(x["values"] ** power), {"power": jnp.asarray(power)})

    def value(x, which):
        return switch_with_gradient(which, [way(2), way(3)], x)

    x = {"values": jnp.arange(1.0, 4.0), "number": jnp.arange(3)}
    gradient = jax.jit(jax.grad(lambda x, which: 5.0 * value(x, which)[0], allow_int=True))
    np.testing.assert_allclose(gradient(x, jnp.asarray(0))["values"], 5 * 2 * x["values"])
    np.testing.assert_allclose(gradient(x, jnp.asarray(1))["values"], 5 * 3 * x["values"] ** 2)
    assert value(x, jnp.asarray(1))[1]["power"] == 3


@eqx.filter_jit
def gradient(model, bytes, capacities):
    def loss(model):
        output = model.loss(bytes, key=jax.random.key(1), capacities=capacities)
        return output.loss, output

    return eqx.filter_grad(loss, has_aux=True)(model)


@pytest.mark.parametrize("name", ["sfe", "hnet"])
def test_losses_and_gradients_do_not_depend_on_the_sizes_to_choose_from(name):
    config = RunConfig(SHAPE, estimator=name, length=24, rate=0.3)
    model = UNet(SHAPE, build_estimator(config, jax.random.key(3)), key=jax.random.key(4))
    bytes = text_bytes(3, 24)
    expected, plain = gradient(model, bytes, (24,))
    got, output = gradient(model, bytes, ((10, 16, 24),))
    assert output.padding < plain.padding
    for name in ("loss", "log_prob", "rate", "overflow"):
        np.testing.assert_allclose(getattr(output, name), getattr(plain, name), rtol=1e-5, atol=1e-7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected)


def test_more_documents_than_tokens_are_counted():
    """The first sequence is twelve documents of a byte or two and has room for four tokens."""
    config = RunConfig(SHAPE, estimator="sfe", length=24, rate=0.3)
    model = UNet(SHAPE, build_estimator(config, jax.random.key(3)), key=jax.random.key(4))
    segments = jnp.zeros((2, 24), jnp.int32).at[0].set(jnp.arange(24) // 2)

    @jax.jit
    def run(bytes):
        layout = plain_layout(bytes, segments)
        sampling = StageSampling(jax.random.key(1), (), None, (4,))
        output = model.stage(model.embed(layout), layout, sampling)
        return output.hidden, output.levels[0]

    bytes = text_bytes(2, 24)
    hidden, level = run(bytes)
    assert level.lengths[0] == 4
    np.testing.assert_array_equal(level.overflow, jnp.sum(level.drawn, axis=1) - level.lengths)
    np.testing.assert_array_equal(hidden[1], run(bytes.at[0].set(97))[0][1])


def test_only_the_largest_size_drops_boundaries():
    model, bytes = small_model(small_score_function()), text_bytes(3, 24)
    whole = losses(model, bytes, key=jax.random.key(1))
    roomy = losses(model, bytes, key=jax.random.key(1), capacities=((2, 24),))
    assert roomy.overflow == 0
    np.testing.assert_allclose(roomy.padding, 1 - roomy.rate, rtol=1e-5)
    tight = losses(model, bytes, key=jax.random.key(1), capacities=((2, 4),))
    assert tight.overflow > 0
    np.testing.assert_allclose(tight.rate + tight.overflow, whole.rate, rtol=1e-6)
    np.testing.assert_allclose(tight.rate, 4 / 24, rtol=1e-6)
    assert tight.padding == 0


@pytest.mark.parametrize(
    ("capacities", "message"),
    [
        ((0,), "a capacity must be a whole number from 1"),
        ((8, -1), "a capacity must"),
        (((8, 4),), "must ascend"),
        (((),), "must ascend"),
        ((8, (2, 4)), "only the outermost level"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(capacities, message):
    with pytest.raises(ValueError, match=message):
        small_model(small_score_function()).loss(text_bytes(1, 8), key=None, capacities=capacities)


def test_a_capacity_beyond_the_length_is_the_length():
    model, bytes = small_model(small_score_function()), text_bytes(2, 12)
    key = jax.random.key(1)
    whole = losses(model, bytes, key=key, capacities=12)
    for capacities in (2**31 - 1, ((2**30, 2**31 - 1),)):
        more = losses(model, bytes, key=key, capacities=capacities)
        np.testing.assert_allclose(more.loss, whole.loss, rtol=1e-6)
        np.testing.assert_allclose(more.padding, whole.padding, rtol=1e-6)
    for samples in (0, -1, 2**40):
        with pytest.raises(ValueError, match="samples must be a whole number from 1 to 4096"):
            model.loss(bytes, key=key, samples=samples)
