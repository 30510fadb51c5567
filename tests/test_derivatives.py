"""Derivatives of higher order, where nothing is chosen at run time."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from estimators import trainable
from tests.compositions import SHAPE, config_of, registered
from tests.conftest import text_bytes
from unet.ops import Implementation


def small_config(name, implementation: Implementation | None = None):
    """Without the blocks of the decoder, which are those of the encoder again: second derivatives compile slowly."""
    unet = dataclasses.replace(SHAPE, decoder_layers=0, implementation=implementation)
    return dataclasses.replace(config_of(name), unet=unet)


def test_a_hessian_vector_product_is_the_gradient_of_a_product():
    usual, native = small_config("sfe"), small_config("sfe", implementation="native")
    bytes, products = text_bytes(2, 16), []
    for config, capacities in ((usual, ((8, 16),)), (native, ())):
        model = registered("sfe", config)
        params, static = eqx.partition(model, trainable(model))

        def loss(params, static=static, capacities=capacities):
            return eqx.combine(params, static).loss(bytes, key=jax.random.key(0), capacities=capacities).loss

        @jax.jit
        def product(params, loss=loss):
            def slope(p):
                return sum(map(jnp.vdot, jax.tree.leaves(jax.grad(loss)(p)), jax.tree.leaves(params)))

            return ravel_pytree(jax.grad(slope)(params))[0]

        products.append(product(params))
        if config is usual:
            # Not in forward mode, as `UNet.loss` says.
            with pytest.raises(TypeError, match="forward-mode"):
                jax.jit(lambda p, loss=loss: jax.jvp(loss, (p,), (p,))).lower(params)
    assert float(jnp.max(jnp.abs(products[1]))) > 1e-3
    np.testing.assert_allclose(products[0], products[1], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["sfe", "gumbel", "hnet"])
def test_a_loss_has_forward_and_second_derivatives(name):
    config = small_config(name, implementation="native")
    model, bytes = registered(name, config), text_bytes(2, 16)
    params, static = eqx.partition(model, trainable(model))
    keys = iter(jax.random.split(jax.random.key(4), len(jax.tree.leaves(params))))
    direction = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), params)

    def loss(params):
        return eqx.combine(params, static).loss(bytes, key=jax.random.key(0), capacities=12).loss

    @jax.jit
    def along(params):
        gradient = jax.grad(loss)
        slope, curvature = jax.jvp(lambda p: jax.jvp(loss, (p,), (direction,))[1], (params,), (direction,))
        by_gradient, product = jax.jvp(gradient, (params,), (direction,))
        return slope, curvature, dot(by_gradient, direction), dot(product, direction)

    def dot(one, other):
        return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))

    slope, curvature, by_gradient, by_product = along(params)
    np.testing.assert_allclose(slope, by_gradient, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(curvature, by_product, rtol=1e-3, atol=1e-4)
    assert abs(float(curvature)) > 1e-3
