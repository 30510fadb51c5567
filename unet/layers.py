"""The small layers every block is made of. Parameters are float32; inputs may be of any floating dtype."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from unet.ops.gating import gated
from unet.ops.mosaic import Implementation
from unet.ops.norms import Normed, add_rms_norm, rms_norm, unit_rms

ROTARY_BASE = 10_000.0
"""Default base of rotary embeddings."""
NORM_EPSILON = 1e-5
"""Default epsilon of `ScaleNorm`."""

Module = TypeVar("Module", bound=eqx.Module)


class Linear(eqx.Module):
    r"""$y = xW$, no bias; the weight is cast to the input's dtype, products are accumulated in float32 or better."""

    # Stored as (inputs, outputs): in a decoding step, which has few positions, a CPU multiplies by it up to twice as fast as by
    # the transpose.
    weight: Float[Array, "inputs outputs"]

    def __init__(self, inputs: int, outputs: int, *, key: PRNGKeyArray):
        """Weights are drawn from a normal of standard deviation `inputs**-0.5`."""
        self.weight = jax.random.normal(key, (outputs, inputs), jnp.float32).T * inputs**-0.5

    @classmethod
    def of(cls, weight: Float[Array, "inputs outputs"]) -> Linear:
        """The layer with this weight."""
        layer = object.__new__(cls)
        object.__setattr__(layer, "weight", weight)
        return layer

    def __call__(self, x: Float[Array, "*shape inputs"]) -> Float[Array, "*shape outputs"]:
        return x @ self.weight.astype(x.dtype)

    def in_float32(self, x: Float[Array, "*shape inputs"]) -> Float[Array, "*shape outputs"]:
        """The same product, returned in float32, in which it is accumulated: for logits that enter a loss."""
        return jnp.matmul(x, self.weight.astype(x.dtype), preferred_element_type=jnp.float32)


def with_fields(module: Module, **changed: object) -> Module:
    """The same module with some fields changed; arrays may be of other shapes, or somewhere else."""
    made: Module = object.__new__(type(module))
    for field in dataclasses.fields(module):
        object.__setattr__(made, field.name, changed.get(field.name, getattr(module, field.name)))
    return made


class Affine(eqx.Module):
    r"""$y = xW + b$, the weight as in `Linear`, the bias zero at first."""

    weight: Float[Array, "inputs outputs"]
    bias: Float[Array, " outputs"]

    def __init__(self, inputs: int, outputs: int, *, key: PRNGKeyArray):
        self.weight = Linear(inputs, outputs, key=key).weight
        self.bias = jnp.zeros((outputs,), jnp.float32)

    def __call__(self, x: Float[Array, "*shape inputs"]) -> Float[Array, "*shape outputs"]:
        return x @ self.weight.astype(x.dtype) + self.bias.astype(x.dtype)


class RMSNorm(eqx.Module):
    r"""$y = (1 + g)\,x/\sqrt{\mathrm{mean}(x^2) + \epsilon}$, computed in float32 and returned in the input's dtype."""

    weight: Float[Array, " dim"]
    epsilon: float = eqx.field(static=True)

    def __init__(self, dim: int, epsilon: float = 1e-6):
        self.weight = jnp.zeros((dim,), jnp.float32)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
        return (unit_rms(x, self.epsilon) * (1.0 + self.weight)).astype(x.dtype)

    def beside(self, x: Float[Array, "*shape dim"], implementation: Implementation | None) -> Normed:
        """x and its norm, for a block that adds to x; see `rms_norm`."""
        return rms_norm(x, 1.0 + self.weight, self.epsilon, implementation=implementation)

    def added_to(
        self,
        residual: Float[Array, "*shape dim"],
        x: Float[Array, "*shape dim"],
        implementation: Implementation | None,
    ) -> Float[Array, "*shape dim"]:
        """The residual plus the norm of x; see `add_rms_norm`."""
        return add_rms_norm(residual, x, 1.0 + self.weight, self.epsilon, implementation=implementation)


class ScaleNorm(eqx.Module):
    r"""$y = g\,x/\sqrt{\mathrm{mean}(x^2) + \epsilon}$ with g = 1 at first, computed in float32 and returned in the input's
    dtype: `RMSNorm` as H-Net parametrises it."""

    weight: Float[Array, " dim"]
    epsilon: float = eqx.field(static=True)

    def __init__(self, dim: int, epsilon: float = NORM_EPSILON):
        self.weight = jnp.ones((dim,), jnp.float32)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
        return (unit_rms(x, self.epsilon) * self.weight.astype(jnp.float32)).astype(x.dtype)

    def beside(
        self, x: Float[Array, "*shape dim"], implementation: Implementation | None, dtype: DTypeLike | None = None
    ) -> Normed:
        """x and its norm in `dtype` (None: that of x), for a block that adds to x; see `rms_norm`."""
        return rms_norm(x, self.weight, self.epsilon, dtype=dtype, implementation=implementation)


class LayerNorm(eqx.Module):
    r"""$y = g\,(x - \bar x)/\sqrt{\mathrm{var}(x) + \epsilon} + b$ with g = 1 and b = 0 at first, computed in float32 and
    returned in the input's dtype (Ba et al., "Layer normalization")."""

    weight: Float[Array, " dim"]
    bias: Float[Array, " dim"]
    epsilon: float = eqx.field(static=True)

    def __init__(self, dim: int, epsilon: float = NORM_EPSILON):
        self.weight, self.bias = jnp.ones((dim,), jnp.float32), jnp.zeros((dim,), jnp.float32)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        scaled = unit_rms(centred, self.epsilon) * self.weight.astype(jnp.float32)
        return (scaled + self.bias.astype(jnp.float32)).astype(x.dtype)

    def beside(
        self, x: Float[Array, "*shape dim"], implementation: Implementation | None, dtype: DTypeLike | None = None
    ) -> Normed:
        """x and its norm in `dtype` (None: that of x), as of `ScaleNorm`, but always in XLA."""
        normed = self(x)
        return Normed(x, normed if dtype is None else normed.astype(dtype))


def for_all_heads(shared: Float[Array, "*shape"], heads: int, axis: int) -> Float[Array, "*repeated"]:
    """Keys or values of `axis` groups of heads, each repeated for the heads of its group, which are adjacent (grouped-query
    attention: Ainslie et al., "GQA")."""
    groups = shared.shape[axis]
    return shared if groups == heads else jnp.repeat(shared, heads // groups, axis=axis)


def require_heads(dim: int, heads: int, kv_heads: int | None) -> int:
    """The number of heads of keys and values: `kv_heads`, or `heads` if that is None. Raises `ValueError` if `heads` does not
    divide `dim`, or `kv_heads` does not divide `heads`."""
    if heads < 1 or dim % heads:
        raise ValueError(f"{heads} heads do not divide a width of {dim}")
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads {kv_heads}: so many heads of keys and values do not divide {heads} heads")
    return kv_heads


@dataclass(frozen=True)
class RotaryScaling:
    r"""Slower rotations for longer texts than those of the first training (Llama 3): a frequency whose wavelength is
    $\lambda > L/\mathrm{low}$ positions is divided by `factor`, one with $\lambda < L/\mathrm{high}$ stays, and between the two
    the divisor changes smoothly. L is `original`, the positions of the first training."""

    factor: float
    low: float
    high: float
    original: float

    def __call__(self, frequencies: Float[Array, " half"]) -> Float[Array, " half"]:
        r"""$f \to (1-s)\,f/\mathrm{factor} + s f$, $s = \mathrm{clip}\big((L f/2\pi - \mathrm{low})/(\mathrm{high} -
        \mathrm{low}), 0, 1\big)$."""
        turns = self.original * frequencies / (2.0 * math.pi)
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return (1.0 - kept) * frequencies / self.factor + kept * frequencies


class Rotary(eqx.Module):
    """Rotary position embedding, non-interleaved halves: cosines and sines of a batch of positions, in float32."""

    cos: Float[Array, "batch length half"]
    sin: Float[Array, "batch length half"]

    def __init__(
        self,
        positions: Int[Array, "batch length"],
        dim: int,
        base: float = ROTARY_BASE,
        scaling: RotaryScaling | None = None,
    ):
        r"""Angles $p\,\mathrm{base}^{-2k/\mathrm{dim}}$ for k < dim/2, with scaled frequencies if there is a `scaling`. Raises
        `ValueError` for an odd `dim`."""
        if dim % 2:
            raise ValueError(f"rotary embeddings rotate pairs of dimensions; {dim} is odd")
        frequencies = base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
        frequencies = frequencies if scaling is None else scaling(frequencies)
        angles = positions[..., None].astype(jnp.float32) * frequencies
        self.cos, self.sin = jnp.cos(angles), jnp.sin(angles)

    def __call__(self, x: Float[Array, "batch length heads head_dim"]) -> Float[Array, "batch length heads head_dim"]:
        """Rotates the first `dim` dimensions of each head and leaves the others unchanged."""
        cos, sin = self.cos[:, :, None, :].astype(x.dtype), self.sin[:, :, None, :].astype(x.dtype)
        half = cos.shape[-1]
        left, right, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return jnp.concatenate([left * cos - right * sin, right * cos + left * sin, rest], axis=-1)


class GeGLU(eqx.Module):
    r"""$W_{down}\big(\mathrm{gelu}_{tanh}(W_{gate}x) \odot W_{up}x\big)$, gate and up in one matrix (gate first)."""

    gate_up: Linear
    down: Linear

    def __init__(self, dim: int, hidden: int, *, key: PRNGKeyArray):
        key_in, key_out = jax.random.split(key)
        self.gate_up = Linear(dim, 2 * hidden, key=key_in)
        self.down = Linear(hidden, dim, key=key_out)

    def __call__(
        self, x: Float[Array, "*shape dim"], implementation: Implementation | None = "native"
    ) -> Float[Array, "*shape dim"]:
        """`implementation`: that of the gating."""
        return self.down(gated(self.gate_up(x), "gelu", implementation=implementation))


class SwiGLU(eqx.Module):
    r"""$W_{out}\big(W_{value}x \odot \mathrm{silu}(W_{gate}x)\big)$, value and gate in one matrix (value first)."""

    value_gate: Linear
    out: Linear

    def __init__(self, dim: int, hidden: int, *, outputs: int | None = None, key: PRNGKeyArray):
        """From `dim` dimensions to `outputs` (None: as many)."""
        key_in, key_out = jax.random.split(key)
        self.value_gate = Linear(dim, 2 * hidden, key=key_in)
        self.out = Linear(hidden, dim if outputs is None else outputs, key=key_out)

    def __call__(
        self, x: Float[Array, "*shape dim"], implementation: Implementation | None = "native"
    ) -> Float[Array, "*shape outputs"]:
        """`implementation`: that of the gating."""
        return self.out(gated(self.value_gate(x), "silu", implementation=implementation))


class MLP(eqx.Module):
    r"""$W_{out}\,\mathrm{gelu}_{tanh}(W_{in}x + b_{in}) + b_{out}$ (GPT-2)."""

    into: Affine
    out: Affine

    def __init__(self, dim: int, hidden: int, *, key: PRNGKeyArray):
        key_in, key_out = jax.random.split(key)
        self.into = Affine(dim, hidden, key=key_in)
        self.out = Affine(hidden, dim, key=key_out)

    def __call__(self, x: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
        return self.out(jax.nn.gelu(self.into(x), approximate=True))
