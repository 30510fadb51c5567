"""Attention in the fused kernels of the library tokamax, for NVIDIA GPUs of the generations Hopper and Blackwell.

They keep logits and weights on the chip. `unet.attention.attend` defines what they compute, and decides between the two.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.extend.backend import get_default_device
from jaxtyping import Array, Bool, Float, Int

from unet.visibility import Located, blocks_of, spans_of, visible

AttentionForm = Literal["auto", "xla", "tokamax"]
"""`xla`: the definition; `tokamax`: the fused kernels, which need CUDA; `auto`: these where they can run, and XLA elsewhere."""

TILE = 128
"""Keys that the kernels process at a time."""
BLOCK = 256
"""Fewest queries of a block of windowed attention. Each block reads the keys of the window before it once more, so that larger
blocks move less memory and compute more logits that no query sees."""
LONGEST = 16_384
"""Most positions of full attention. Its mask is a byte for each pair: 256 MiB for each sequence at this length."""
CAPABILITIES = 9.0, 11.0
"""Compute capabilities of the kernels: from the first (Hopper) to below the second (Blackwell in data centres)."""
HEAD_DIMS = (64, 96, 128)
"""Widths of a head that the kernels were compiled for."""
SEVERAL = "several devices share a step, and tokamax's kernels do not run inside jax.shard_map"
"""Why there are no kernels on several devices: they do not say over which of them their results vary."""


@runtime_checkable
class Kernel(Protocol):
    """`tokamax.dot_product_attention`, as far as it is used here."""

    def __call__(
        self,
        query: Float[Array, "batch queries heads head_dim"],
        key: Float[Array, "batch keys heads head_dim"],
        value: Float[Array, "batch keys heads head_dim"],
        *,
        mask: Bool[Array, "batch 1 queries keys"],
        is_causal: bool,
        logits_soft_cap: float | None,
        implementation: Literal["mosaic"],
    ) -> Float[Array, "batch queries heads head_dim"]: ...


def missing() -> str | None:
    """An error message if tokamax is not installed, else None."""
    if importlib.util.find_spec("tokamax") is None:
        return "tokamax is not installed: pip install 'caesura-lm[gpu]', which needs Python 3.12 or newer"
    return None


def unable() -> str | None:
    """Why the kernels cannot run here on the default device, whatever the shapes; None if they can."""
    if jax.sharding.get_abstract_mesh().manual_axes:
        return SEVERAL
    device = get_default_device()
    if device.platform != "gpu":
        return "there is no CUDA device"
    least, most = CAPABILITIES
    if not least <= float(device.compute_capability) < most:
        return f"the GPU has compute capability {device.compute_capability}, which tokamax has no gradient for"
    return missing()


def refusal(length: int, head_dim: int, window: int | None, dtype: jnp.dtype) -> str | None:
    """Why the kernels cannot attend in sequences of `length`, or cannot run in this process; None if they can."""
    if lack := unable():
        return lack
    if dtype != jnp.bfloat16:
        return f"attention is in {jnp.dtype(dtype).name}, not in bfloat16"
    if head_dim not in HEAD_DIMS:
        return f"heads are {head_dim} wide, not {', '.join(map(str, HEAD_DIMS))}"
    if window is None and length > LONGEST:
        return f"{length} positions are more than {LONGEST}"
    return None


@functools.cache
def tokamax_kernel() -> Kernel:
    """`tokamax.dot_product_attention`. Importing it takes seconds."""
    from tokamax import dot_product_attention  # pyrefly: ignore[missing-import] -- of the extra `gpu`

    # For every shape it warns, in a screenful of JSON, that it was not tuned for it, and goes on with a usual choice.
    logging.getLogger("absl").addFilter(lambda record: "Autotuning cache miss" not in str(record.msg))
    return dot_product_attention


def attend_fused(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads head_dim"],
    segments: Int[Array, "batch length"],
    window: int | None,
    cap: float | None,
    *,
    kernel: Kernel | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """`unet.attention.attend` in a `kernel` (None: that of tokamax). `segments`: the document of each position, negative for
    padding.

    Over a window, queries are cut into blocks, each with the keys that it may see, since the kernels' gradient would otherwise
    compute the logits of all pairs.
    """
    if kernel is None:
        kernel = tokamax_kernel()
    length = query.shape[1]
    before = 0 if window is None else -(-(window - 1) // TILE) * TILE
    block = max(BLOCK, before)
    if window is None or length <= block:
        block, before = -(-length // TILE) * TILE, 0

    def batched(blocks: Array) -> Array:
        return blocks.reshape(-1, *blocks.shape[2:])

    queries = Located(*(batched(blocks_of(part, block, fill=-1)) for part in _located(segments, block)))
    keys = Located(*(batched(spans_of(part, block, before, fill=-2)) for part in _located(segments, block)))
    with jax.named_scope("fused_attention"):
        mixed = kernel(
            batched(blocks_of(query, block, fill=0)),
            batched(spans_of(key, block, before, fill=0)),
            batched(spans_of(value, block, before, fill=0)),
            mask=visible(queries, keys, window)[:, None],
            is_causal=before == 0,
            logits_soft_cap=cap,
            implementation="mosaic",
        )
    # Some of the kernels for Blackwell return float32.
    return mixed.reshape(query.shape[0], -1, *query.shape[2:])[:, :length].astype(value.dtype)


def _located(segments: Array, block: int) -> tuple[Array, Array]:
    """The segments and positions of whole blocks. Each position of the padding sees itself, since a softmax needs one key."""
    segments = jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % block)), constant_values=-1)
    return segments, jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
