"""What the state-space recurrence of a Mamba-2 layer takes, at several lengths and against a plain scan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.benchmark.timing import Work, in_turns
from unet.mamba import HEAD
from unet.ops.ssd import SSDOutput, ssd, ssd_sequential

LENGTHS = (1024, 4096, 16384)
"""Positions of one sequence."""

COMPARED = 4096
"""Positions at which the plain scan is timed as well."""


@dataclass(frozen=True)
class RecurrenceReport:
    """`seconds` of the recurrence and its gradient; what a position takes relative to the shortest length; and, where a plain
    scan was timed, how many times its speed that is."""

    seconds: float
    per_position: float
    times_a_scan: float | None


def recurrence(dim: int, state: int, *, rounds: int, calls: int) -> dict[str, RecurrenceReport]:
    """Forward and backward, of a layer that is twice `dim` wide inside, with states of `state` columns; all take turns."""
    works = {str(length): _work(ssd, length, dim, state) for length in LENGTHS}
    timings = in_turns(works, baseline=str(LENGTHS[0]), rounds=rounds, calls=calls)
    shortest = timings[str(LENGTHS[0])].seconds / LENGTHS[0]
    pair = {"scan": _work(ssd_sequential, COMPARED, dim, state), "chunks": _work(ssd, COMPARED, dim, state)}
    speedup = in_turns(pair, baseline="scan", rounds=rounds, calls=1)["chunks"].speedup
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
    writes, reads = (jax.random.normal(key, (1, length, state)) for key in keys[2:])
    starts = jnp.zeros((1, length), bool)

    def weighed(values: Array, decay: Array, writes: Array, reads: Array) -> Array:
        return jnp.sum(jnp.sin(form(values, decay, writes, reads, starts).y))

    gradient = jax.jit(jax.grad(weighed, argnums=(0, 1, 2, 3)))
    return lambda: gradient(values, decay, writes, reads)
