"""Compiles every kernel for one GPU that is not there, and prints what it is called: `python compile_kernels.py h100`."""

import sys

import jax
import jax.numpy as jnp

from estimators.base import Limits
from experiments.benchmark.deviceless import TARGETS, compile_for, mesh_of, optimized_hlo
from unet.ops import boundary_scan, downsample, smooth, upsample
from unet.ops.gating import gated
from unet.ops.norms import add_rms_norm, rms_norm

BATCH, LENGTH, TOKENS = 2, 64, 24


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def down(hidden, actions):
    out, back = jax.vjp(lambda rows: downsample(rows, actions, TOKENS).values, hidden)
    return out, back(out)


def up(hidden, actions):
    out, back = jax.vjp(lambda rows: upsample(rows, actions), hidden[:, :TOKENS])
    return out, back(out)


def average(hidden, actions):
    out, back = jax.vjp(smooth, hidden, jnp.where(actions, 0.75, 0.25))
    return out, back(out)


def norms(stream, hidden, scale):
    def block(stream, hidden, scale):
        return rms_norm(add_rms_norm(stream, hidden, scale, 1e-6), scale, 1e-6, dtype=hidden.dtype)

    out, back = jax.vjp(block, stream, hidden, scale)
    return out, back(out)


def gates(hidden):
    def both(hidden):
        return gated(hidden, "gelu"), gated(hidden, "silu")

    out, back = jax.vjp(both, hidden)
    return out, back(out)


def limited_scan(projections, uniforms, least, most, size):
    return boundary_scan(projections, uniforms, None, 6.0, Limits(least, most, True, size))


def report(mesh, name, op, *args):
    kernels = optimized_hlo(compile_for(mesh, op, *args)).count('custom_call_target="mosaic_gpu')
    print(f"{name} {kernels}", flush=True)


def main(target):
    mesh = mesh_of(TARGETS[target])
    report(mesh, "boundary_scan", boundary_scan, shape(BATCH, LENGTH, 5), shape(BATCH, LENGTH))
    sizes = shape(BATCH, LENGTH, dtype=jnp.int32)
    scanned = shape(BATCH, LENGTH, 5), shape(BATCH, LENGTH)
    report(mesh, "limited_scan", limited_scan, *scanned, sizes, sizes, shape(BATCH, dtype=jnp.int32))
    for dim in (384, 512, 768, 2048):
        narrow, wide = (shape(BATCH, LENGTH, dim, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
        for name, stream, hidden in (("bfloat16", narrow, narrow), ("float32", wide, wide), ("both", wide, narrow)):
            report(mesh, f"norms-{dim}-{name}", norms, stream, hidden, shape(dim))
    for dim in (384, 3072):
        for dtype in (jnp.bfloat16, jnp.float32):
            report(mesh, f"gates-{dim}-{jnp.dtype(dtype).name}", gates, shape(BATCH, LENGTH, 2 * dim, dtype=dtype))
    for op in (down, up, average):
        for dim in (384, 512, 768, 1024):
            for dtype in (jnp.bfloat16, jnp.float32):
                rows, actions = shape(BATCH, LENGTH, dim, dtype=dtype), shape(BATCH, LENGTH, dtype=bool)
                report(mesh, f"{op.__name__}-{dim}-{jnp.dtype(dtype).name}", op, rows, actions)


if __name__ == "__main__":
    main(sys.argv[1])
