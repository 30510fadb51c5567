"""Every kernel and fused operation against XLA on the device: values, gradients and time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from estimators.base import Layout
from experiments.benchmark.device.asked import Asked, Compute, Item, Result
from experiments.benchmark.timing import Timing, dispatched, time_interleaved
from experiments.config.presets import PRESETS
from experiments.config.settings import RunConfig, transformer_shape
from unet import UNetConfig, fused_attention
from unet.attention import Visibility, attend
from unet.ops import boundary_scan, downsample, mean_pool, smooth, upsample
from unet.ops.gating import gated
from unet.ops.mosaic import refusal
from unet.ops.norms import add_rms_norm, rms_norm

CLOSE = {"float32": 1e-5, "bfloat16": 1e-2}
"""How far values and gradients may be apart, relative to the largest; sums of a gradient over a sequence ten times as far."""

OPS = ("boundary scan", "downsample", "upsample", "mean pooling", "smoothing", "norm", "sum with a norm", "gated MLP")
ATTENTION = ("attention of the byte level", "attention of the token level")

Form = Literal["auto", "xla"]
"""As the library chooses, or in XLA."""


@dataclass(frozen=True)
class Case:
    """An operation at the shape of a preset."""

    op: str
    dtype: Compute
    batch: int
    length: int
    tokens: int
    dim: int
    heads: int
    window: int
    memory: int
    """Actions that the policy remembers."""

    @property
    def name(self) -> str:
        """Operation, dtype and the sizes it depends on."""
        if self.op == "boundary scan":
            return f"{self.op}, {self.batch} × {self.length}, a memory of {self.memory}"
        length = self.tokens if self.op in ("smoothing", ATTENTION[1]) else self.length
        inner = f"{self.heads} × {self.dim // self.heads}" if self.op in ATTENTION else f"{self.dim}"
        return f"{self.op}, {self.dtype}, {self.batch} × {length} × {inner}"

    @property
    def refused(self) -> str | None:
        """Why there is no kernel for it here; None if there is one."""
        dtype, head = jnp.dtype(self.dtype), self.dim // self.heads
        if self.op == ATTENTION[0]:
            return fused_attention.refusal(self.length, head, self.window, dtype)
        if self.op == ATTENTION[1]:
            return fused_attention.refusal(self.tokens, head, None, dtype)
        if jax.default_backend() != "gpu":
            return "there is no CUDA device"
        return refusal(128, jnp.dtype("float32")) if self.op == "boundary scan" else refusal(self.dim, dtype)


def items(asked: Asked) -> list[Item]:
    """A comparison of each operation in each dtype at each shape of a preset: first those of the models that are asked for."""
    return [Item(case.name, functools.partial(compare, case, asked)) for case in cases(asked)]


def cases(asked: Asked) -> list[Case]:
    """The distinct cases, the most important first."""
    others = [name for name, run in PRESETS.items() if isinstance(run.unet, UNetConfig) and name not in asked.models]
    found: dict[str, Case] = {}
    for dtypes, names in ((asked.dtypes[:1], asked.models), (asked.dtypes[1:], asked.models), (asked.dtypes, others)):
        for name in names:
            for dtype in dtypes:
                for case in _of_preset(asked.config(name), dtype):
                    found.setdefault(case.name, case)
    return list(found.values())


def _of_preset(run: RunConfig, dtype: Compute) -> Iterator[Case]:
    shape = transformer_shape(run)
    memory = getattr(run.sections["policy"], "window", 0)
    tokens = round(run.capacity_slack * run.rate * run.length)
    for op in (*OPS, *ATTENTION):
        if op != "boundary scan" or memory:
            yield Case(op, dtype, run.batch, run.length, tokens, shape.dim, shape.heads, shape.window, memory)


def compare(case: Case, asked: Asked) -> Result:
    """Values, gradients and times of an operation as the library chooses, against XLA."""
    works: dict[str, Callable[[], tuple[Array, Array]]] = {form: _work(case, form) for form in ("auto", "xla")}
    refused = case.refused
    (value, gradient), (wanted, wanted_gradient) = works["auto"](), works["xla"]()
    if case.op == "boundary scan":
        off, agrees = float(jnp.mean(value != wanted)), None
        close = {"actions that differ": off, "values off by": None, "gradients off by": None}
        # An exponential that differs in its last bit turns an action where both numbers agree to seven digits.
        agrees = off < 1e-3
    else:
        values, gradients = _apart(value, wanted), _apart(gradient, wanted_gradient)
        close = {"actions that differ": None, "values off by": values, "gradients off by": gradients}
        agrees = values <= CLOSE[case.dtype] and gradients <= 10 * CLOSE[case.dtype]
    # Launches are hidden behind the calls before them, as within a step.
    together = {form: dispatched(work, asked.calls) for form, work in works.items()}
    times = time_interleaved(together, baseline="xla", rounds=asked.rounds)
    return {
        "agrees": agrees,
        **close,
        "ms": 1e3 * times["auto"].seconds / asked.calls,
        "XLA, ms": 1e3 * times["xla"].seconds / asked.calls,
        "times XLA's speed": times["auto"].speedup,
        "never slower": None if refused else never_slower(times["auto"]),
        "in XLA, since": refused,
    }


def never_slower(timing: Timing) -> bool:
    """Whether the baseline is not distinguishably faster: the interval reaches 1, or there are too few rounds for one."""
    return math.isnan(timing.high) or timing.high >= 1


def _apart(found: Array, wanted: Array) -> float:
    """The largest difference, relative to the largest number."""
    one, other = (np.asarray(array, np.float32) for array in (found, wanted))
    return float(np.max(np.abs(one - other)) / max(float(np.max(np.abs(other))), 1e-30))


def _work(case: Case, form: Form) -> Callable[[], tuple[Array, Array]]:
    """The operation compiled, and its gradient but for the boundary scan: its outputs, and the gradient of a weighted sum."""
    keys = jax.random.split(jax.random.key(0), 4)
    batch, length = case.batch, case.length
    uniforms = jax.random.uniform(keys[0], (batch, length))
    if case.op == "boundary scan":
        lags = jax.random.normal(keys[1], (batch, length, case.memory + 1)).at[..., 0].add(-1.4)
        implementation = None if form == "auto" else "xla"

        @jax.jit
        def scan(lags: Array) -> tuple[Array, Array]:
            found = boundary_scan(lags, uniforms, cap=6.0, implementation=implementation)
            return found.actions, found.logits

        return lambda: scan(lags)
    rows, function = _operation(case, form, uniforms < case.tokens / 1.35 / length)
    values = jax.random.normal(keys[2], rows).astype(case.dtype)

    outputs = jax.eval_shape(function, values)
    # Not drawn within what is timed.
    weights = jax.random.normal(keys[3], outputs.shape).astype(outputs.dtype)

    def weighted(values: Array, weights: Array) -> tuple[Array, Array]:
        out = function(values)
        return jnp.sum((out * weights).astype(jnp.float32)), out

    compiled = jax.jit(jax.value_and_grad(weighted, has_aux=True))

    def work() -> tuple[Array, Array]:
        (_, out), gradient = compiled(values, weights)
        return out, gradient

    return work


def _operation(case: Case, form: Form, drawn: Array) -> tuple[Sequence[int], Callable[[Array], Array]]:
    """The shape of an operation's rows, and the operation."""
    batch, length, tokens, dim = case.batch, case.length, case.tokens, case.dim
    implementation = None if form == "auto" else "xla"
    actions = drawn.at[:, 0].set(True)
    if case.op in ATTENTION:
        windowed = case.op == ATTENTION[0]
        shape = batch, length if windowed else tokens
        segments = jnp.zeros(shape, jnp.int32)
        layout = Layout(segments, segments, segments, jnp.ones(shape, bool))
        visibility = Visibility(layout, case.window if windowed else None, form)
        return (*shape, case.heads, dim // case.heads), lambda x: attend(x, x, x, visibility, cap=50.0)
    if case.op == "norm":
        # Both results, so that both gradients are there to be added.
        both = functools.partial(rms_norm, scale=jnp.ones(dim), epsilon=1e-6, implementation=implementation)
        return (batch, length, dim), lambda x: jnp.add(*both(x))
    if case.op == "sum with a norm":
        return (batch, length, dim), lambda x: add_rms_norm(x, x, jnp.ones(dim), 1e-6, implementation=implementation)
    if case.op == "gated MLP":
        return (batch, length, 2 * dim), lambda x: gated(x, "gelu", implementation=implementation)
    if case.op == "smoothing":
        probs = jax.random.uniform(jax.random.key(4), (batch, tokens))
        return (batch, tokens, dim), lambda x: smooth(x, probs, implementation=implementation)
    if case.op == "upsample":
        return (batch, tokens, dim), lambda x: upsample(x, actions, implementation=implementation)
    pooled = downsample if case.op == "downsample" else mean_pool
    return (batch, length, dim), lambda x: pooled(x, actions, tokens, implementation=implementation).values
