"""Gated activations of an MLP, whose gradient takes from the forward pass only what its products keep anyway.

XLA also keeps the activation of the gates, or writes it again in the backward pass, since both halves of the gradient need it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from unet.ops.mosaic import LANES, Implementation, declare, dispatch, refusal

Activation = Literal["gelu", "silu"]

Half = TypeVar("Half")

MAX_LANES = 8
"""Most values of each half that a thread holds at once."""


def gated(
    halves: Float[Array, "*shape both"], activation: Activation, *, implementation: Implementation | None = None
) -> Float[Array, "*shape half"]:
    r"""$\mathrm{gelu}_{tanh}(g) \odot v$ of `halves` = [g, v] (Gemma), or $v \odot \mathrm{silu}(g)$ of [v, g] (Llama, H-Net).

    Widths that the kernel does not take stay in XLA whatever the `implementation`.
    """
    if implementation == "native":
        return _product(halves, activation)
    return _gated(halves, activation, implementation)


ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


def gelu_and_slope(x: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    r"""$\tfrac{x}{2}(1 + t)$ with $t = \tanh(\sqrt{2/\pi}\,(x + 0.044715\,x^3))$, and its derivative."""
    rate = math.sqrt(2.0 / math.pi)
    t = jnp.tanh(rate * (x + 0.044715 * x * x * x))
    half = 0.5 * (1.0 + t)
    return x * half, half + 0.5 * x * (1.0 - t * t) * rate * (1.0 + 3.0 * 0.044715 * x * x)


def silu_and_slope(x: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    r"""$x\sigma(x)$ and its derivative."""
    share = 1.0 / (1.0 + jnp.exp(-x))
    return x * share, share * (1.0 + x * (1.0 - share))


WITH_SLOPE = {"gelu": gelu_and_slope, "silu": silu_and_slope}


def _gates_first(activation: Activation, first: Half, second: Half) -> tuple[Half, Half]:
    """The two halves, that of the gates first."""
    return (first, second) if activation == "gelu" else (second, first)


def _product(halves: Array, activation: Activation) -> Array:
    gates, values = _gates_first(activation, *jnp.split(halves, 2, axis=-1))
    return ACTIVATIONS[activation](gates) * values


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gated(halves: Array, activation: Activation, implementation: Implementation | None) -> Array:
    return _product(halves, activation)


def _forward(halves: Array, activation: Activation, implementation: Implementation | None) -> tuple[Array, Array]:
    return _gated(halves, activation, implementation), halves


def _backward(
    activation: Activation, implementation: Implementation | None, halves: Array, gradient: Array
) -> tuple[Array]:
    def kernel(interpret: bool):
        return functools.partial(_kernel, activation=activation, interpret=interpret)

    xla = functools.partial(_gradient_xla, activation=activation)
    refused = refusal(gradient.shape[-1], halves.dtype)
    return (dispatch("gated", refused, implementation, halves, gradient, xla=xla, kernel=kernel, optional=True),)


_gated.defvjp(_forward, _backward)


def _gradient_xla(halves: Array, gradient: Array, *, activation: Activation) -> Array:
    [change] = jax.vjp(functools.partial(_product, activation=activation), halves)[1](gradient)
    return change


def _kernel(halves: Array, gradient: Array, *, activation: Activation, interpret: bool) -> Array:
    """A program for each row and each piece of its columns."""
    from jax.experimental import pallas as pl

    dim = gradient.shape[-1]
    size = next(size for size in range(MAX_LANES, 0, -1) if dim % (size * LANES) == 0) * LANES
    inputs = halves.reshape(-1, 2 * dim), gradient.reshape(-1, dim)

    def body(halves_ref, gradient_ref, out_ref):
        row, start = jax.lax.axis_index("x"), jax.lax.axis_index("y") * size
        places = _gates_first(activation, pl.ds(start, size), pl.ds(dim + start, size))
        gates, values = (halves_ref[row, place].astype(jnp.float32) for place in places)
        outer = gradient_ref[row, pl.ds(start, size)].astype(jnp.float32)
        active, slope = WITH_SLOPE[activation](gates)
        for place, change in zip(places, (outer * values * slope, outer * active), strict=True):
            out_ref[row, place] = change.astype(halves.dtype)

    out = jax.ShapeDtypeStruct(inputs[0].shape, halves.dtype)
    [changes] = declare(body, [out], (inputs[0].shape[0], dim // size), interpret=interpret)(*inputs)
    return changes.reshape(halves.shape)
