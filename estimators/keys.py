"""Keys of random numbers, split by the name of what they are for."""

from __future__ import annotations

import zlib

import jax
from jaxtyping import PRNGKeyArray


def named_key(key: PRNGKeyArray, *names: str) -> PRNGKeyArray:
    """The key for what `names` say, one inside the other: the CRC-32 of each is folded in.

    Numbers would not do: `split(key)[1]` and `fold_in(key, 1)` are the same key, so that parts which know nothing of each other
    could draw the same weights.
    """
    for name in names:
        key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return key
