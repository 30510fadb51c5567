"""Rank promotion inside this library, whatever the user's setting is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

Given = ParamSpec("Given")
Result = TypeVar("Result")


def with_rank_promotion(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """The function with implicit rank promotion allowed while it runs or is traced. Under `jax_numpy_rank_promotion="raise"`
    JAX would otherwise refuse, say, to multiply hidden states by a norm's weight."""

    @functools.wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return run
