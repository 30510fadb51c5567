"""Decoding steps that run the token level only for the sequences that close a token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from unet.capacity import smallest_with_room
from unet.decoding.kv_cache import MIN_SLICED_SLOTS, filled_quarters, most_slots, select_sequences

Output = TypeVar("Output", bound=PyTree[Array])


def for_closed(stage: Callable[..., Output], closed: Bool[Array, " batch"], operands: tuple[PyTree, ...]) -> Output:
    """`stage(*operands)` for the sequences that are `closed`; the output for the others has no meaning.

    All arrays are batch-major, and the last operand is the decode state. The closed sequences are gathered into the smallest
    batch that holds them: none, a quarter, half or all of the batch. So the cost follows the number of tokens, although
    sequences close them at different times. Most steps take the quarter-batch branch. It slices KV caches to their filled
    length, in quarters of their slots.
    """
    batch = closed.shape[0]
    sizes = sorted({-(-batch // 4), -(-batch // 2), batch})
    closed_first = jnp.argsort(~closed, stable=True)

    def run(size: int, quarters: int = 4) -> Output:
        if size == batch:
            return stage(*operands)
        chosen = closed_first[:size]
        output = stage(*select_sequences(operands, chosen, quarters))
        return jax.tree.map(lambda leaf: jnp.zeros((batch, *leaf.shape[1:]), leaf.dtype).at[chosen].set(leaf), output)

    def skip() -> Output:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(lambda: run(batch)))

    state = operands[-1]
    # Not for a whole batch, such as a single text: it reads its caches in place, and copying the filled part saves nothing.
    parts = (2, 3, 4) if sizes[0] < batch and most_slots(state) >= MIN_SLICED_SLOTS else (4,)
    branches = [functools.partial(run, sizes[0], quarters) for quarters in parts]
    # Which of the branches [skip, smallest batch by quarters of its caches, larger batches].
    by_quarters = jnp.clip(filled_quarters(state, closed_first[: sizes[0]]) - parts[0], 0, len(branches) - 1)
    size = smallest_with_room(jnp.sum(closed, dtype=jnp.int32), sizes)
    which = jnp.where(size == 0, by_quarters, len(branches) - 1 + size)
    which = jnp.where(jnp.any(closed), 1 + which, 0)
    return jax.lax.switch(which, [skip, *branches, *(functools.partial(run, size) for size in sizes[1:])])
