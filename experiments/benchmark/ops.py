"""Each ragged operation against a plain way to the same result, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from estimators import AbstractRouter, Boundaries, CosineRouter, Draw, Likelier, equations
from experiments.benchmark.timing import Timing, Work, in_turns
from unet.attention import Visibility, attend
from unet.chunkers import SelectSmooth
from unet.model import plain_layout
from unet.ops import boundary_scan, downsample, mean_pool, smooth, token_of, upsample

BATCH, LENGTH, DIM, RATE = 8, 4096, 512, 1 / 6
"""What every operation is measured at: sequences, rows, width, and the share of rows with a boundary."""

CAPACITY = round(1.35 * RATE * LENGTH)


@dataclass(frozen=True)
class Compared:
    """An operation's own timing, whose `speedup` is over `other`, the way that it was measured against."""

    own: Timing
    other: str


def compare_operations(*, rounds: int, calls: int) -> dict[str, Compared]:
    """Every operation, one after another; those against PyTorch only where it is installed."""
    found = {}
    for name, pair in {**_operations(jax.random.key(0)), **_peers()}.items():
        other, works = pair
        timings = in_turns(works, baseline="other", rounds=rounds, calls=calls)
        found[name] = Compared(timings["own"], other)
    return found


Pair = tuple[str, dict[str, Work]]
"""What the other way is, and the two pieces of work, `own` and `other`."""


def _operations(key: PRNGKeyArray) -> dict[str, Pair]:
    key_hidden, key_actions, key_probs, key_uniforms = jax.random.split(key, 4)
    hidden = jax.random.normal(key_hidden, (BATCH, LENGTH, DIM))
    actions = jax.random.uniform(key_actions, (BATCH, LENGTH)) < RATE
    tokens = downsample(hidden, actions, CAPACITY).values
    probs = jax.random.uniform(key_probs, (BATCH, CAPACITY))
    projections = jax.random.normal(key_probs, (BATCH, LENGTH, 8))
    uniforms = jax.random.uniform(key_uniforms, (BATCH, LENGTH))
    heads = hidden[:1].reshape(1, LENGTH, 8, -1)
    layout = plain_layout(jnp.zeros((1, LENGTH), jnp.int32))
    return {
        "downsample": (
            "a product with one-hot rows",
            _both(
                lambda x: downsample(x, actions, CAPACITY).values,
                lambda x: jnp.einsum("btl,bld->btd", _one_hot(actions), x),
                hidden,
            ),
        ),
        "upsample": (
            "a product with one-hot rows",
            _both(
                lambda y: upsample(y, actions),
                lambda y: jnp.einsum("blt,btd->bld", jax.nn.one_hot(token_of(actions), CAPACITY), y),
                tokens,
            ),
        ),
        "mean pooling": (
            "a product with the matrix of groups",
            _both(
                lambda x: mean_pool(x, actions, CAPACITY).values,
                lambda x: jnp.einsum("btl,bld->btd", _groups(actions), x),
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


def _peers() -> dict[str, Pair]:
    """Dynamic chunking against the module of the package h-net-dynamic-chunking, where that is installed."""
    try:
        from experiments.benchmark.torch_chunking import torch_chunking
    except ModuleNotFoundError:
        return {}
    hidden = changing_signs(jax.random.key(1))
    router = Likelier(CosineRouter(DIM, target_rate=RATE))
    found = {}
    for what, projected in {"dynamic chunking": router, "the same without the two projections": None}.items():
        own = _jitted(jax.grad(_chunking_loss), (projected, hidden))
        other = torch_chunking(np.asarray(hidden), RATE, projected=projected is not None)
        found[what] = "h-net-dynamic-chunking", {"own": own, "other": other}
    return found


def _chunking_loss(both: tuple[AbstractRouter | None, Float[Array, "batch length dim"]]) -> Float[Array, ""]:
    """Down, up and the ratio loss; without a router boundaries lie where the rows themselves are unlike."""
    router, hidden = both
    layout = plain_layout(jnp.zeros(hidden.shape[:2], jnp.int32))
    if router is None:
        probs = equations.routing_probability(hidden, hidden, layout.starts)
        boundaries = Boundaries(probs > 0.5, probs, probs, layout.free, layout.starts)
    else:
        boundaries = router(hidden, layout, Draw(boundary_scan))
    chunker = SelectSmooth()
    rows = chunker.down(hidden, boundaries, capacity=CAPACITY)
    back = chunker.up(rows.values, rows, hidden, boundaries)
    ratio = equations.ratio_loss(boundaries.actions, boundaries.probs, 1 / RATE)
    return jnp.mean(back * hidden) + 0.03 * ratio


def changing_signs(key: PRNGKeyArray) -> Float[Array, "batch length dim"]:
    """Rows that stay nearly the same and turn into their opposite at `RATE` of them, where a cosine router sees boundaries."""
    key_base, key_turns, key_noise = jax.random.split(key, 3)
    turns = jax.random.uniform(key_turns, (BATCH, LENGTH, 1)) < RATE
    signs = 1.0 - 2.0 * (jnp.cumsum(turns, axis=1) % 2)
    noise = 0.1 * jax.random.normal(key_noise, (BATCH, LENGTH, DIM))
    return signs * jax.random.normal(key_base, (BATCH, 1, DIM)) + noise


def _both(own: Callable[[Array], Array], other: Callable[[Array], Array], x: Array) -> dict[str, Work]:
    """Value and gradient of either way, jitted."""

    def graded(way: Callable[[Array], Array]) -> Work:
        return _jitted(jax.value_and_grad(lambda x: jnp.sum(jnp.square(way(x)))), x)

    return {"own": graded(own), "other": graded(other)}


def _jitted(function: Callable[..., PyTree], *arguments: PyTree) -> Work:
    jitted = jax.jit(function)
    return lambda: jitted(*arguments)


def _one_hot(actions: Bool[Array, "batch length"]) -> Float[Array, "batch tokens length"]:
    """1 where a row is that at which a token closes."""
    token = jnp.where(actions, token_of(actions), -1)
    return jnp.swapaxes(jax.nn.one_hot(token, CAPACITY), 1, 2)


def _groups(actions: Bool[Array, "batch length"]) -> Float[Array, "batch tokens length"]:
    """1 / size where a row is in the group that a token closes."""
    member = jnp.swapaxes(jax.nn.one_hot(token_of(actions) + 1 - actions, CAPACITY), 1, 2)
    return member / jnp.maximum(jnp.sum(member, axis=2, keepdims=True), 1.0)


def _smooth_by_scan(
    values: Float[Array, "batch tokens dim"], probs: Float[Array, "batch tokens"]
) -> Float[Array, "batch tokens dim"]:
    inside = jnp.clip(probs, 1e-4, 1.0 - 1e-4).at[:, 0].set(1.0)

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


def _call_by_call(projections: Float[Array, "batch length taps"], uniforms: Float[Array, "batch length"]) -> Work:
    """A policy that is asked row by row from Python."""

    @jax.jit
    def step(past: Array, number: Array) -> Array:
        q, u = projections[:, number], uniforms[:, number]
        action = u < jax.nn.sigmoid(q[:, 0] + jnp.sum(q[:, 1:] * past, axis=1))
        return jnp.concatenate([action[:, None].astype(q.dtype), past[:, :-1]], axis=1)

    def work() -> Array:
        past = jnp.zeros((projections.shape[0], projections.shape[-1] - 1))
        for number in range(projections.shape[1]):
            past = step(past, jnp.asarray(number))
        return past

    return work
