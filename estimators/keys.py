"""PRNG keys derived by name."""

from __future__ import annotations

import zlib

import jax
from jaxtyping import PRNGKeyArray


def named_key(key: PRNGKeyArray, *names: str) -> PRNGKeyArray:
    """The key for the nested `names`: the CRC-32 of each is folded in, in order.

    Small numbers are not safe: `split(key)[1]` and `fold_in(key, 1)` are the same key, so that unrelated modules could draw the
    same weights.
    """
    for name in names:
        key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return key
