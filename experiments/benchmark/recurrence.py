"""Time of the state-space recurrence of a Mamba-2 layer at several lengths, and compared with a sequential scan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.benchmark.timing import Work, time_interleaved
from unet.mamba import HEAD
from unet.ops.ssd import SSDOutput, ssd, ssd_sequential

LENGTHS = (1024, 4096, 16384)
"""Sequence lengths."""

COMPARED = 4096
"""Sequence length at which the sequential scan is timed as well."""


@dataclass(frozen=True)
class RecurrenceReport:
    """`seconds`: time of the recurrence and its gradient. `per_position`: time per position relative to the shortest length.
    `times_a_scan`: speedup over the sequential scan, at the length `COMPARED` only."""

    seconds: float
    per_position: float
    times_a_scan: float | None


def recurrence(dim: int, state: int, *, rounds: int, calls: int) -> dict[str, RecurrenceReport]:
    """Time the recurrence, forward and backward, for an inner width of 2 `dim` and states of size `state`. Lengths are
    interleaved."""
    works = {str(length): _work(ssd, length, dim, state) for length in LENGTHS}
    timings = time_interleaved(works, baseline=str(LENGTHS[0]), rounds=rounds, calls=calls)
    shortest = timings[str(LENGTHS[0])].seconds / LENGTHS[0]
    implementations = {"scan": _work(ssd_sequential, COMPARED, dim, state), "chunks": _work(ssd, COMPARED, dim, state)}
    speedup = time_interleaved(implementations, baseline="scan", rounds=rounds, calls=1)["chunks"].speedup
    return {
        str(length): RecurrenceReport(
            timings[str(length)].seconds,
            timings[str(length)].seconds / length / shortest,
            speedup if length == COMPARED else None,
        )
        for length in LENGTHS
    }


def _work(form: Callable[[Array, Array, Array, Array, Array], SSDOutput], length: int, dim: int, state: int) -> Work:
    heads = 2 * dim // HEAD
    keys = jax.random.split(jax.random.key(0), 4)
    values = jax.random.normal(keys[0], (1, length, heads, HEAD))
    decay = -jax.nn.softplus(jax.random.normal(keys[1], (1, length, heads)))
    B, C = (jax.random.normal(key, (1, length, state)) for key in keys[2:])
    starts = jnp.zeros((1, length), bool)

    def scalar_output(values: Array, decay: Array, B: Array, C: Array) -> Array:
        return jnp.sum(jnp.sin(form(values, decay, B, C, starts).y))

    gradient = jax.jit(jax.grad(scalar_output, argnums=(0, 1, 2, 3)))
    return lambda: gradient(values, decay, B, C)
