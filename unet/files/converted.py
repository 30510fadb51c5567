"""Published parameters as arrays of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np

from unet.files.errors import LayoutError, shown

WeightType = Literal["float32", "bfloat16"]


def converted(name: str, value: np.ndarray, wanted: np.dtype) -> np.ndarray:
    """The parameter `name` in the dtype `wanted`, contiguous. Raises `LayoutError` for what are no weights, and for values that
    are too large for it."""
    result = np.empty(value.shape, wanted)
    fill(name, value, result)
    return result


def fill(name: str, value: np.ndarray, place: np.ndarray) -> None:
    """Write the parameter `name` to an array of its shape, in that dtype. Raises `LayoutError` as `converted`."""
    if value.dtype not in (np.float64, np.float32, np.float16, jnp.bfloat16):
        raise LayoutError(f"{name} is {value.dtype}; weights must be float64, float32, float16 or bfloat16")
    with np.errstate(over="ignore"):
        place[...] = value
    if place.dtype.itemsize < value.dtype.itemsize and not np.array_equal(np.isfinite(value), np.isfinite(place)):
        raise LayoutError(f"{name} has values that are too large for {place.dtype}")


def require_shape(name: str, shape: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise `LayoutError` if the parameter `name` has another shape than is wanted."""
    if tuple(shape) != tuple(wanted):
        raise LayoutError(f"{name} has shape {list(shape)}; the configuration asks for {list(wanted)}")


def require_names(wanted: Iterable[str], given: Iterable[str]) -> None:
    """Raise `LayoutError` if other parameters are given than are wanted."""
    missing, surplus = sorted({*wanted} - {*given}), sorted({*given} - {*wanted})
    if missing or surplus:
        raise LayoutError(
            f"parameters do not fit the configuration: {len(missing)} missing{_example(missing)}, "
            f"{len(surplus)} unknown{_example(surplus)}"
        )


def _example(names: Sequence[str]) -> str:
    return f" (such as {shown(names[0])})" if names else ""
