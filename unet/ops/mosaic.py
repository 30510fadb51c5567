"""What the kernels share: how they are declared, which shapes they take, and how a platform is chosen."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

Implementation = Literal["xla", "pallas", "interpret"]
"""`xla`: the definition; `pallas`: the Mosaic GPU kernel, which needs CUDA; `interpret`: the same kernel, slowly, on the host.

Where an argument takes None as well, that is the kernel on CUDA if it takes the shapes at hand, and XLA elsewhere.
"""

LANES = 128
"""Threads of a warpgroup: rows are worked on in pieces of so many columns."""

OLDEST = 9.0
"""Compute capability (Hopper) that the kernels were compiled for at least."""

AHEAD = 8
"""Rows that a kernel in sequence reads at once: their loads wait for nothing, only what is made of them does."""

Result = TypeVar("Result")

_log = logging.getLogger(__name__)


@functools.cache
def _unable() -> str | None:
    """What keeps this process from kernels of any shape."""
    try:
        importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    except ImportError as error:
        return f"this build of jax has no Mosaic GPU ({error})"
    if jax.default_backend() == "gpu" and float(jax.devices()[0].compute_capability) < OLDEST:
        return f"the GPU has compute capability {jax.devices()[0].compute_capability}, below {OLDEST}"
    return None


def refusal(dim: int, dtype: jnp.dtype) -> str | None:
    """Why rows of `dim` values of `dtype` are not for the kernels, or this process is not; None where they are."""
    if dim % LANES:
        return f"rows of {dim} values are not a multiple of {LANES}"
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"rows are {jnp.dtype(dtype).name}, neither float32 nor bfloat16"
    # Last, since it imports the kernels' language: half a second for whoever has no use for it.
    return _unable()


def dispatch(
    name: str,
    refused: str | None,
    implementation: Implementation | None,
    *args: Array,
    xla: Callable[..., Result],
    kernel: Callable[..., Callable[..., Result]],
) -> Result:
    """Run `xla` or `kernel(interpret)` on `args`, as `implementation` says; the choice by platform falls at lowering.

    Raises `ValueError` where the kernel was asked for by name and refuses; `pallas` on another platform than CUDA fails when
    it is lowered. XLA cannot cut a kernel into parts for several devices: a batch that is spread over them needs `xla`.
    """
    if implementation == "xla":
        return xla(*args)
    if refused is not None:
        if implementation is not None:
            raise ValueError(f"the kernel of {name} cannot run: {refused}")
        _log.info("%s runs in XLA on every platform: %s", name, refused)
        return xla(*args)
    if implementation == "interpret":
        return kernel(interpret=True)(*args)
    if implementation == "pallas":
        return jax.lax.platform_dependent(*args, cuda=kernel(interpret=False))
    return jax.lax.platform_dependent(*args, cuda=kernel(interpret=False), default=xla)


def declare(
    body: Callable[..., None], out: Sequence[jax.ShapeDtypeStruct], grid: tuple[int, ...], *, interpret: bool
) -> Callable[..., Sequence[Array]]:
    """A Mosaic GPU kernel of one warpgroup a program: `body(*input_refs, *output_refs)` for every point of `grid`.

    The axes of the grid are called `x`, `y`, … in `jax.lax.axis_index`.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpreter = None
    if interpret:
        interpreter = getattr(plgpu, "InterpretParams", None)
        if interpreter is None:
            # Public under this name from the next version of jax on.
            from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as interpreter
    return plgpu.kernel(
        body,
        out_type=list(out),
        grid=grid,
        grid_names=tuple("xyz"[: len(grid)]),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=None if interpreter is None else interpreter(),
    )
