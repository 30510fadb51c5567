"""Compiles attention in the kernels of tokamax for a GPU that is not there: `python compile_attention.py h100`."""

import sys

import jax
import jax.numpy as jnp

from estimators.base import Layout
from experiments.benchmark.deviceless import TARGETS, compile_for, mesh_of, optimized_hlo
from unet.attention import Visibility, attend


def main(target):
    mesh = mesh_of(TARGETS[target])
    parts = jax.ShapeDtypeStruct((2, 300, 2, 64), jnp.bfloat16)
    segments, mask = (jax.ShapeDtypeStruct((2, 300), dtype) for dtype in ("int32", "bool"))
    for name, window in (("full", None), ("windowed", 64)):

        def loss(query, key, value, segments, mask, window=window):
            visibility = Visibility(Layout(segments, segments, segments, mask), window, "auto")
            return jnp.sum(attend(query, key, value, visibility, cap=50.0).astype(jnp.float32))

        compiled = compile_for(mesh, jax.grad(loss, argnums=(0, 1, 2)), parts, parts, parts, segments, mask)
        print(name, optimized_hlo(compiled).count('custom_call_target="mosaic_gpu'), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
