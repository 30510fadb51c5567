"""Rank promotion inside this library, whatever the user's setting is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

Given = ParamSpec("Given")
Result = TypeVar("Result")


def own_promotion(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """The function with rank promotion allowed while it runs or is traced (`jax_numpy_rank_promotion="raise"` would refuse a
    norm's weight)."""

    @functools.wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        with jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return run
