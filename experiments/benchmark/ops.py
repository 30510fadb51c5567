"""Each ragged operation compared with a plain implementation, including gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from estimators import AbstractRouter, Boundaries, CosineRouter, Greedy, SamplingOptions, equations
from experiments.benchmark.timing import Timing, Work, time_interleaved
from unet.attention import Visibility, attend
from unet.chunkers import Chunker, Select, Smooth
from unet.likelihood import plain_layout
from unet.ops import boundary_scan, downsample, mean_pool, smooth, token_of, upsample


@dataclass(frozen=True)
class Sizes:
    """Sizes of the inputs. `rate`: fraction of positions with a boundary."""

    batch: int = 8
    length: int = 4096
    dim: int = 512
    rate: float = 1 / 6

    @property
    def capacity(self) -> int:
        """Maximum tokens per sequence."""
        return round(1.35 * self.rate * self.length)


@dataclass(frozen=True)
class Compared:
    """The timing of an operation (`own`), with the speedup over an alternative described by `other`."""

    own: Timing
    other: str


def compare_operations(sizes: Sizes, *, rounds: int, calls: int) -> dict[str, Compared]:
    """Time all operations. Comparisons with PyTorch are left out if it is not installed."""
    results = {}
    for name, (other, works) in {**operations(sizes, jax.random.key(0)), **_torch_pairs(sizes)}.items():
        timings = time_interleaved(works, baseline="other", rounds=rounds, calls=calls)
        results[name] = Compared(timings["own"], other)
    return results


Pair = tuple[str, dict[str, Work]]
"""A description of the alternative, and the two functions to time: `own` and `other`."""


def operations(sizes: Sizes, key: PRNGKeyArray) -> dict[str, Pair]:
    """Each operation of this library and a plain implementation. Both functions of a pair return the same values; all but the
    boundary scan include the gradient."""
    batch, length, capacity = sizes.batch, sizes.length, sizes.capacity
    key_hidden, key_actions, key_probs, key_uniforms = jax.random.split(key, 4)
    hidden = jax.random.normal(key_hidden, (batch, length, sizes.dim))
    actions = jax.random.uniform(key_actions, (batch, length)) < sizes.rate
    tokens = downsample(hidden, actions, capacity).values
    probs = jax.random.uniform(key_probs, (batch, capacity))
    projections = jax.random.normal(key_probs, (batch, length, 8))
    uniforms = jax.random.uniform(key_uniforms, (batch, length))
    heads = hidden[:1].reshape(1, length, 8, -1)
    layout = plain_layout(jnp.zeros((1, length), jnp.int32))
    return {
        "downsample": (
            "a product with a one-hot matrix",
            _with_gradients(
                lambda x: downsample(x, actions, capacity).values,
                lambda x: jnp.einsum("btl,bld->btd", _one_hot(actions, capacity), x),
                hidden,
            ),
        ),
        "upsample": (
            "a product with a one-hot matrix",
            _with_gradients(
                lambda y: upsample(y, actions),
                lambda y: jnp.einsum(
                    "blt,btd->bld", jax.nn.one_hot(jnp.minimum(token_of(actions), capacity - 1), capacity), y
                ),
                tokens,
            ),
        ),
        "mean pooling": (
            "a product with the averaging matrix",
            _with_gradients(
                lambda x: mean_pool(x, actions, capacity).values,
                lambda x: jnp.einsum("btl,bld->btd", _mean_matrix(actions, capacity), x),
                hidden,
            ),
        ),
        "smoothing": (
            "a scan over the tokens",
            _with_gradients(lambda y: smooth(y, probs), lambda y: _smooth_by_scan(y, probs), tokens),
        ),
        "windowed attention, 64 of one sequence": (
            "dense attention with a mask",
            _with_gradients(
                lambda x: attend(x, x, x, Visibility(layout, 64), cap=50.0),
                lambda x: _dense_attention(x, 64),
                heads,
            ),
        ),
        "boundary scan, a memory of 7": (
            "a call for each position",
            {
                "own": _jitted(lambda q: boundary_scan(q, uniforms).actions, projections),
                "other": _python_loop(projections, uniforms),
            },
        ),
    }


def _torch_pairs(sizes: Sizes) -> dict[str, Pair]:
    """Dynamic chunking and the module of the package h-net-dynamic-chunking; empty if that is not installed."""
    try:
        from experiments.benchmark.torch_chunking import torch_chunking
    except ModuleNotFoundError:
        return {}
    hidden = np.asarray(changing_signs(sizes, jax.random.key(1)))
    pairs = {}
    for name, projected in {"dynamic chunking": True, "the same without the two projections": False}.items():
        works = {
            "own": chunking_work(sizes, projected=projected),
            "other": torch_chunking(hidden, sizes.rate, projected=projected),
        }
        pairs[name] = "h-net-dynamic-chunking", works
    return pairs


def chunking_work(sizes: Sizes, *, projected: bool) -> Work:
    """The gradient of dynamic chunking, with or without projections of queries and keys."""
    router = Greedy(CosineRouter(sizes.dim, target_rate=sizes.rate)) if projected else None
    inputs = router, changing_signs(sizes, jax.random.key(1))
    return _jitted(jax.grad(functools.partial(_chunking_loss, sizes=sizes)), inputs)


def _chunking_loss(
    inputs: tuple[AbstractRouter | None, Float[Array, "batch length dim"]], sizes: Sizes
) -> Float[Array, ""]:
    """Downsampling, upsampling and the ratio loss. Without a router, boundaries follow from the cosine similarity of the hidden
    states themselves."""
    router, hidden = inputs
    layout = plain_layout(jnp.zeros(hidden.shape[:2], jnp.int32))
    if router is None:
        probs = equations.routing_probability(hidden, hidden, layout.starts)
        boundaries = Boundaries(probs > 0.5, probs, probs, layout.free, layout.starts)
    else:
        boundaries = router(hidden, layout, SamplingOptions(boundary_scan))
    chunker = Chunker(Select(), Smooth())
    downsampled = chunker.down(hidden, boundaries, capacity=sizes.capacity).tokens
    upsampled = chunker.up(downsampled.values, downsampled, hidden, boundaries).hidden
    ratio = equations.ratio_loss(boundaries.actions, boundaries.probs, 1 / sizes.rate)
    return jnp.mean(upsampled * hidden) + 0.03 * ratio


def changing_signs(sizes: Sizes, key: PRNGKeyArray) -> Float[Array, "batch length dim"]:
    """Noisy constant vectors whose sign changes at a fraction `rate` of the positions, where a cosine router draws boundaries."""
    key_base, key_changes, key_noise = jax.random.split(key, 3)
    changes = jax.random.uniform(key_changes, (sizes.batch, sizes.length, 1)) < sizes.rate
    signs = 1.0 - 2.0 * (jnp.cumsum(changes, axis=1) % 2)
    noise = 0.1 * jax.random.normal(key_noise, (sizes.batch, sizes.length, sizes.dim))
    return signs * jax.random.normal(key_base, (sizes.batch, 1, sizes.dim)) + noise


def _with_gradients(own: Callable[[Array], Array], other: Callable[[Array], Array], x: Array) -> dict[str, Work]:
    """Compiled functions for both implementations: the sum of squares of the output, and its gradient with respect to `x`."""

    def with_gradient(form: Callable[[Array], Array]) -> Work:
        return _jitted(jax.value_and_grad(lambda x: jnp.sum(jnp.square(form(x)))), x)

    return {"own": with_gradient(own), "other": with_gradient(other)}


def _jitted(function: Callable[..., PyTree], *arguments: PyTree) -> Work:
    jitted = jax.jit(function)
    return lambda: jitted(*arguments)


def _one_hot(actions: Bool[Array, "batch length"], capacity: int) -> Float[Array, "batch tokens length"]:
    """1 where a position is the boundary of a token."""
    token = jnp.where(actions, token_of(actions), -1)
    return jnp.swapaxes(jax.nn.one_hot(token, capacity), 1, 2)


def _mean_matrix(actions: Bool[Array, "batch length"], capacity: int) -> Float[Array, "batch tokens length"]:
    """1 / n where a position is one of the n positions of a token, which ends with its boundary."""
    group = token_of(actions) + 1 - actions
    closed = group < jnp.sum(actions, axis=1, keepdims=True)
    member = jnp.swapaxes(jax.nn.one_hot(jnp.where(closed, group, -1), capacity), 1, 2)
    return member / jnp.maximum(jnp.sum(member, axis=2, keepdims=True), 1.0)


def _smooth_by_scan(
    values: Float[Array, "batch tokens dim"], probs: Float[Array, "batch tokens"]
) -> Float[Array, "batch tokens dim"]:
    clipped = jnp.clip(probs, 1e-4, 1.0 - 1e-4)

    def step(state: Array, token: tuple[Array, Array]) -> tuple[Array, Array]:
        value, p = token
        state = p[:, None] * value + (1.0 - p[:, None]) * state
        return state, state

    tokens = jnp.swapaxes(values, 0, 1), clipped.T
    return jnp.swapaxes(jax.lax.scan(step, jnp.zeros_like(values[:, 0]), tokens)[1], 0, 1)


def _dense_attention(x: Float[Array, "batch length heads head_dim"], window: int) -> Array:
    """Self-attention with a dense matrix of logits and a mask for the window."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", x, x) * x.shape[-1] ** -0.5
    position = jnp.arange(x.shape[1])
    distance = position[:, None] - position[None, :]
    logits = jnp.where((distance >= 0) & (distance < window), 50.0 * jnp.tanh(logits / 50.0), -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1), x)


def _python_loop(projections: Float[Array, "batch length lags"], uniforms: Float[Array, "batch length"]) -> Work:
    """The boundary policy as a Python loop, with one call for each position."""

    @jax.jit
    def step(past: Array, position: Array) -> tuple[Array, Array]:
        q, u = projections[:, position], uniforms[:, position]
        action = (u < jax.nn.sigmoid(q[:, 0] + jnp.sum(q[:, 1:] * past, axis=1))) | (position == 0)
        return jnp.concatenate([action[:, None].astype(q.dtype), past[:, :-1]], axis=1), action

    def work() -> Array:
        past, actions = jnp.zeros((projections.shape[0], projections.shape[-1] - 1)), []
        for position in range(projections.shape[1]):
            past, action = step(past, jnp.asarray(position))
            actions.append(action)
        return jnp.stack(actions, axis=1)

    return work
