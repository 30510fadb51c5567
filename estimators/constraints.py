"""Constraints: where boundaries may and must stand, whatever a router would like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp

from estimators.base import AbstractEstimator, Estimator, Layout
from estimators.bounds import ChunkLength, require_within
from estimators.equations import NEVER, rate_with_longest, rate_with_shortest
from estimators.limits import Limits
from estimators.lookup import Kind
from estimators.routers.constrained import AbstractConstraint, Constrained
from estimators.routers.rules import bytes_missing


class WholeCharacters(AbstractConstraint):
    """Only after the last byte of a UTF-8 character.

    It is the first byte of a character that tells how many follow, so this is causal. What is no UTF-8 stays free: after bytes
    of no character boundaries may stand, so that any text can be cut.
    """

    outermost_only: ClassVar[bool] = True

    @property
    def reach(self) -> int:
        return 3

    def limits(self, layout: Layout) -> Limits:
        least = jnp.where(bytes_missing(layout) > 0, NEVER, 1)
        return Limits(least, jnp.full_like(least, NEVER), sized=False)


class MaxLength(AbstractConstraint):
    """A boundary where the chunk has `n` bytes (BLT's maximum patch length), or as soon after as one may stand there: with
    `WholeCharacters`, chunks have up to n + 3.

    Inside a hierarchy it counts the tokens of the level around. Raises `ValueError` for n below 1 or above 2^24.
    """

    n: ChunkLength = eqx.field(static=True)
    """The most bytes of a chunk."""

    def __init__(self, n: ChunkLength, inner_n: ChunkLength | None = None, level: int = 0):
        """`inner_n`: the most tokens of a chunk at levels inside the first; by default n."""
        self.n = _size("max-length", n, inner_n, level)

    def limits(self, layout: Layout) -> Limits:
        least = jnp.ones_like(layout.bytes)
        return Limits(least, jnp.full_like(least, self.n))

    def rate(self, drawn: float) -> float:
        return rate_with_longest(drawn, self.n)


class MinLength(AbstractConstraint):
    """No boundary where the chunk has fewer than `n` bytes.

    Inside a hierarchy it counts the tokens of the level around. Raises `ValueError` for n below 1 or above 2^24.
    """

    n: ChunkLength = eqx.field(static=True)
    """The fewest bytes of a chunk; the last one of a document may have fewer."""

    def __init__(self, n: ChunkLength, inner_n: ChunkLength | None = None, level: int = 0):
        """`inner_n`: the fewest tokens of a chunk at levels inside the first; by default n."""
        self.n = _size("min-length", n, inner_n, level)

    def limits(self, layout: Layout) -> Limits:
        least = jnp.full_like(layout.bytes, self.n)
        return Limits(least, jnp.full_like(least, NEVER))

    def rate(self, drawn: float) -> float:
        return rate_with_shortest(drawn, self.n)


def _size(name: str, n: int, inner_n: int | None, level: int) -> int:
    require_within(f"{name}.n, which counts the bytes of a chunk,", n, ChunkLength)
    if inner_n is None:
        return n
    require_within(f"{name}.inner-n, which counts the tokens of a chunk,", inner_n, ChunkLength)
    return n if level == 0 else inner_n


CONSTRAINTS = Kind(
    "--constrain",
    "caesura.constraints",
    {"characters": WholeCharacters, "max-length": MaxLength, "min-length": MinLength},
    (AbstractConstraint,),
    frozenset({"level"}),
)
"""Constraints by name. `level` is the number of the level, 0 for the outermost."""


def constrained(estimator: AbstractEstimator, constraints: Sequence[AbstractConstraint]) -> AbstractEstimator:
    """The estimator with its router constrained; the same one without constraints. Raises `ValueError` where the longest chunks
    would be shorter than the shortest."""
    if not constraints:
        return estimator
    longest = min((one.n for one in constraints if isinstance(one, MaxLength)), default=NEVER)
    shortest = max((one.n for one in constraints if isinstance(one, MinLength)), default=1)
    if longest < shortest:
        raise ValueError(f"chunks cannot have at most {longest} and at least {shortest} bytes: raise max-length")
    return Estimator(Constrained(estimator.router, tuple(constraints)), estimator.chunker, estimator.objective)
