"""Common code of the kernels: declaration, supported shapes, and dispatch by platform."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.backend import get_default_device
from jaxtyping import Array

from estimators.sharding import varying_like
from unet.numerics import with_rank_promotion

Implementation = Literal["xla", "native", "pallas", "interpret"]
"""`xla`: the reference implementation, with a hand-written gradient; `native`: the same with JAX's own derivatives, of any
order and in forward mode too; `pallas`: the Mosaic GPU kernel, which needs CUDA; `interpret`: that kernel emulated on the host,
slowly.

If an argument is None, the kernel runs on CUDA if it supports the shapes, and XLA otherwise.
"""

LANES = 128
"""Threads of a warpgroup, and the number of columns that kernels process at a time."""

MIN_CAPABILITY = 9.0
"""Minimum compute capability of the kernels (Hopper)."""

AHEAD = 8
"""Positions that a sequential kernel loads at once, so that loads do not wait for the recurrence."""

Result = TypeVar("Result")

_log = logging.getLogger(__name__)


@functools.cache
def _lacks_mosaic() -> str | None:
    try:
        importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    except ImportError as error:
        return f"this build of jax has no Mosaic GPU ({error})"
    return None


def _unable() -> str | None:
    """Why no kernel can run on the default device, whatever the shapes; None if they can, or if it is no GPU."""
    device = get_default_device()
    if device.platform == "gpu" and float(device.compute_capability) < MIN_CAPABILITY:
        return f"the GPU has compute capability {device.compute_capability}, below {MIN_CAPABILITY}"
    return _lacks_mosaic()


def refusal(dim: int, dtype: jnp.dtype) -> str | None:
    """Why kernels cannot process rows of `dim` values of `dtype`, or cannot run in this process; None if they can."""
    if dim % LANES:
        return f"rows of {dim} values are not a multiple of {LANES}"
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"rows are {jnp.dtype(dtype).name}, neither float32 nor bfloat16"
    # Last, since it imports the kernel language, which takes half a second.
    return _unable()


@with_rank_promotion  # gradients written by hand are traced when the model's own functions have returned
def dispatch(
    name: str,
    refused: str | None,
    implementation: Implementation | None,
    *args: Array,
    xla: Callable[..., Result],
    kernel: Callable[..., Callable[..., Result]],
    optional: bool = False,
) -> Result:
    """Run `xla` or `kernel(interpret)` on `args`, as `implementation` says; the choice by platform is made at lowering.

    Raises `ValueError` if a kernel requested by name cannot run, unless it is `optional`; `pallas` on a platform other than CUDA
    fails at lowering. XLA cannot partition a kernel: over several devices it runs in a `jax.shard_map`, as training steps do, or
    as `xla`.
    """
    if implementation in ("xla", "native"):
        return xla(*args)
    if refused is not None:
        if implementation is not None and not optional:
            raise ValueError(f"the kernel of {name} cannot run: {refused}")
        _log.info("%s runs in XLA on every platform: %s", name, refused)
        return xla(*args)
    if implementation == "interpret":
        return kernel(interpret=True)(*args)

    def on_cuda(*args: Array) -> Result:
        return jax.tree.map(lambda output: varying_like(output, args[0]), kernel(interpret=False)(*args))

    if implementation == "pallas":
        return jax.lax.platform_dependent(*args, cuda=on_cuda)
    return jax.lax.platform_dependent(*args, cuda=on_cuda, default=xla)


def declare(
    body: Callable[..., None], out: Sequence[jax.ShapeDtypeStruct], grid: tuple[int, ...], *, interpret: bool
) -> Callable[..., Sequence[Array]]:
    """A Mosaic GPU kernel with one warpgroup per program: `body(*input_refs, *output_refs)` for every point of `grid`.

    The axes of the grid are called `x`, `y`, … in `jax.lax.axis_index`.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpreter = None
    if interpret:
        interpreter = getattr(plgpu, "InterpretParams", None)
        if interpreter is None:
            # Not public before the next version of jax.
            from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as interpreter
    return plgpu.kernel(
        body,
        out_type=list(out),
        grid=grid,
        grid_names=tuple("xyz"[: len(grid)]),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=None if interpreter is None else interpreter(),
    )
