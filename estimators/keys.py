"""PRNG keys derived by name."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PRNGKeyArray

THREEFRY = "threefry2x32"


def named_key(key: PRNGKeyArray, *names: str) -> PRNGKeyArray:
    """The key for the nested `names`: the CRC-32 of each is folded in, in order.

    Small numbers are not safe: `split(key)[1]` and `fold_in(key, 1)` are the same key, so that unrelated modules could draw the
    same weights.
    """
    for name in names:
        key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return key


def threefry_keys(keys: Key[Array, "*shape"]) -> Key[Array, "*shape"]:
    """The keys themselves, or Threefry keys made of the data of others.

    With other generators, what is drawn or derived from a key of a batch depends on the other keys of the batch.
    """
    if str(jax.random.key_impl(keys)) == THREEFRY:
        return keys
    first, second, *others = jnp.moveaxis(jax.random.key_data(keys), -1, 0)
    made = jax.random.wrap_key_data(jnp.stack([first, second], axis=-1), impl=THREEFRY)
    fold = jax.random.fold_in
    for _ in range(made.ndim):
        fold = jax.vmap(fold)
    for word in others:
        made = fold(made, word)
    return made
