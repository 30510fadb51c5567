"""Each ragged operation against a plain form of it, with its gradient where it has one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from estimators import AbstractRouter, Boundaries, CosineRouter, Greedy, SamplingOptions, equations
from experiments.benchmark.timing import Timing, Work, in_turns
from unet.attention import Visibility, attend
from unet.chunkers import Chunker, Select, Smooth
from unet.likelihood import plain_layout
from unet.ops import boundary_scan, downsample, mean_pool, smooth, token_of, upsample


@dataclass(frozen=True)
class Sizes:
    """What operations are measured at: sequences, positions, width, and the fraction of positions with a boundary."""

    batch: int = 8
    length: int = 4096
    dim: int = 512
    rate: float = 1 / 6

    @property
    def capacity(self) -> int:
        """Most tokens of each sequence."""
        return round(1.35 * self.rate * self.length)


@dataclass(frozen=True)
class Compared:
    """An operation's own timing, whose `speedup` is over `other`, what it was measured against."""

    own: Timing
    other: str


def compare_operations(sizes: Sizes, *, rounds: int, calls: int) -> dict[str, Compared]:
    """Every operation, one after another; those against PyTorch only where it is installed."""
    found = {}
    for name, (other, works) in {**operations(sizes, jax.random.key(0)), **_peers(sizes)}.items():
        timings = in_turns(works, baseline="other", rounds=rounds, calls=calls)
        found[name] = Compared(timings["own"], other)
    return found


Pair = tuple[str, dict[str, Work]]
"""What the other form is, and the two pieces of work, `own` and `other`."""


def operations(sizes: Sizes, key: PRNGKeyArray) -> dict[str, Pair]:
    """Each operation of this library beside a plain form; both return the same value and gradient."""
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
            "a product with one-hot rows",
            _both(
                lambda x: downsample(x, actions, capacity).values,
                lambda x: jnp.einsum("btl,bld->btd", _one_hot(actions, capacity), x),
                hidden,
            ),
        ),
        "upsample": (
            "a product with one-hot rows",
            _both(
                lambda y: upsample(y, actions),
                lambda y: jnp.einsum(
                    "blt,btd->bld", jax.nn.one_hot(jnp.minimum(token_of(actions), capacity - 1), capacity), y
                ),
                tokens,
            ),
        ),
        "mean pooling": (
            "a product with the matrix of groups",
            _both(
                lambda x: mean_pool(x, actions, capacity).values,
                lambda x: jnp.einsum("btl,bld->btd", _groups(actions, capacity), x),
                hidden,
            ),
        ),
        "smoothing": (
            "a scan over the tokens",
            _both(lambda y: smooth(y, probs), lambda y: _smooth_by_scan(y, probs), tokens),
        ),
        "windowed attention, 64 of one sequence": (
            "a masked square",
            _both(
                lambda x: attend(x, x, x, Visibility(layout, 64), cap=50.0),
                lambda x: _masked_square(x, 64),
                heads,
            ),
        ),
        "boundary scan, a memory of 7": (
            "a call for each row",
            {
                "own": _jitted(lambda q: boundary_scan(q, uniforms).actions, projections),
                "other": _call_by_call(projections, uniforms),
            },
        ),
    }


def _peers(sizes: Sizes) -> dict[str, Pair]:
    """Dynamic chunking against the module of the package h-net-dynamic-chunking, where that is installed."""
    try:
        from experiments.benchmark.torch_chunking import torch_chunking
    except ModuleNotFoundError:
        return {}
    hidden = changing_signs(sizes, jax.random.key(1))
    router = Greedy(CosineRouter(sizes.dim, target_rate=sizes.rate))
    found = {}
    for what, projected in {"dynamic chunking": router, "the same without the two projections": None}.items():
        own = _jitted(jax.grad(functools.partial(_chunking_loss, sizes=sizes)), (projected, hidden))
        other = torch_chunking(np.asarray(hidden), sizes.rate, projected=projected is not None)
        found[what] = "h-net-dynamic-chunking", {"own": own, "other": other}
    return found


def _chunking_loss(
    both: tuple[AbstractRouter | None, Float[Array, "batch length dim"]], sizes: Sizes
) -> Float[Array, ""]:
    """Down, up and the ratio loss; without a router boundaries lie where the rows themselves are unlike."""
    router, hidden = both
    layout = plain_layout(jnp.zeros(hidden.shape[:2], jnp.int32))
    if router is None:
        probs = equations.routing_probability(hidden, hidden, layout.starts)
        boundaries = Boundaries(probs > 0.5, probs, probs, layout.free, layout.starts)
    else:
        boundaries = router(hidden, layout, SamplingOptions(boundary_scan))
    chunker = Chunker(Select(), Smooth())
    rows = chunker.down(hidden, boundaries, capacity=sizes.capacity).tokens
    back = chunker.up(rows.values, rows, hidden, boundaries).hidden
    ratio = equations.ratio_loss(boundaries.actions, boundaries.probs, 1 / sizes.rate)
    return jnp.mean(back * hidden) + 0.03 * ratio


def changing_signs(sizes: Sizes, key: PRNGKeyArray) -> Float[Array, "batch length dim"]:
    """Rows that stay nearly the same and turn into their opposite at `rate` of them, where a cosine router sees boundaries."""
    key_base, key_turns, key_noise = jax.random.split(key, 3)
    turns = jax.random.uniform(key_turns, (sizes.batch, sizes.length, 1)) < sizes.rate
    signs = 1.0 - 2.0 * (jnp.cumsum(turns, axis=1) % 2)
    noise = 0.1 * jax.random.normal(key_noise, (sizes.batch, sizes.length, sizes.dim))
    return signs * jax.random.normal(key_base, (sizes.batch, 1, sizes.dim)) + noise


def _both(own: Callable[[Array], Array], other: Callable[[Array], Array], x: Array) -> dict[str, Work]:
    """Value and gradient of both forms, jitted."""

    def graded(form: Callable[[Array], Array]) -> Work:
        return _jitted(jax.value_and_grad(lambda x: jnp.sum(jnp.square(form(x)))), x)

    return {"own": graded(own), "other": graded(other)}


def _jitted(function: Callable[..., PyTree], *arguments: PyTree) -> Work:
    jitted = jax.jit(function)
    return lambda: jitted(*arguments)


def _one_hot(actions: Bool[Array, "batch length"], capacity: int) -> Float[Array, "batch tokens length"]:
    """1 where a row is that at which a token closes."""
    token = jnp.where(actions, token_of(actions), -1)
    return jnp.swapaxes(jax.nn.one_hot(token, capacity), 1, 2)


def _groups(actions: Bool[Array, "batch length"], capacity: int) -> Float[Array, "batch tokens length"]:
    """1 / size where a row is in the group that a token closes."""
    group = token_of(actions) + 1 - actions
    closed = group < jnp.sum(actions, axis=1, keepdims=True)
    member = jnp.swapaxes(jax.nn.one_hot(jnp.where(closed, group, -1), capacity), 1, 2)
    return member / jnp.maximum(jnp.sum(member, axis=2, keepdims=True), 1.0)


def _smooth_by_scan(
    values: Float[Array, "batch tokens dim"], probs: Float[Array, "batch tokens"]
) -> Float[Array, "batch tokens dim"]:
    inside = jnp.clip(probs, 1e-4, 1.0 - 1e-4)

    def step(state: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        value, p = row
        state = p[:, None] * value + (1.0 - p[:, None]) * state
        return state, state

    rows = jnp.swapaxes(values, 0, 1), inside.T
    return jnp.swapaxes(jax.lax.scan(step, jnp.zeros_like(values[:, 0]), rows)[1], 0, 1)


def _masked_square(x: Float[Array, "batch length heads head_dim"], window: int) -> Array:
    """Attention of rows to themselves, over all of which a mask leaves a window."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", x, x) * x.shape[-1] ** -0.5
    place = jnp.arange(x.shape[1])
    distance = place[:, None] - place[None, :]
    logits = jnp.where((distance >= 0) & (distance < window), 50.0 * jnp.tanh(logits / 50.0), -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits, axis=-1), x)


def _call_by_call(projections: Float[Array, "batch length lags"], uniforms: Float[Array, "batch length"]) -> Work:
    """A policy that is asked row by row from Python."""

    @jax.jit
    def step(past: Array, number: Array) -> tuple[Array, Array]:
        q, u = projections[:, number], uniforms[:, number]
        action = (u < jax.nn.sigmoid(q[:, 0] + jnp.sum(q[:, 1:] * past, axis=1))) | (number == 0)
        return jnp.concatenate([action[:, None].astype(q.dtype), past[:, :-1]], axis=1), action

    def work() -> Array:
        past, actions = jnp.zeros((projections.shape[0], projections.shape[-1] - 1)), []
        for number in range(projections.shape[1]):
            past, action = step(past, jnp.asarray(number))
            actions.append(action)
        return jnp.stack(actions, axis=1)

    return work
