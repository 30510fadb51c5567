"""Digests of arrays that lie in parts on many devices and processes, the same however they are divided."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree, UInt64

Described = tuple[tuple[int, ...], str, str]
"""Shape, dtype and digest of an array."""

Sums = UInt64[np.ndarray, "leaves two"]

BLOCK = 2**16
"""Numbers that are mixed at a time, so that they stay in a processor's cache."""

_ODD = [np.uint64(one) for one in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93)]


def described(tree: PyTree[Array | np.ndarray]) -> dict[str, Described]:
    """Shape, dtype and digest of every leaf by its path. Every process has to call this, and gets the same.

    The digest of an array is the sum of a mix of each number's bits and its place, modulo 2⁶⁴, for two mixes: 128 bits. So each
    part of an array is mixed where it lies, and no part is sent anywhere. It tells bits that were changed by accident, not on
    purpose.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums: Sums = np.array([_summed(leaf) for _, leaf in leaves], np.uint64).reshape(-1, 2)
    if jax.process_count() > 1:
        # As halves, since 64 bits would be cut to 32.
        gathered = np.asarray(multihost_utils.process_allgather(sums.view(np.uint32)), np.uint32)
        sums = np.add.reduce(np.ascontiguousarray(gathered).view(np.uint64), axis=0)
    digests = [f"{int(first):016x}{int(second):016x}" for first, second in zip(sums[:, 0], sums[:, 1], strict=True)]
    return {
        jax.tree_util.keystr(path): (tuple(leaf.shape), str(leaf.dtype), digest)
        for (path, leaf), digest in zip(leaves, digests, strict=True)
    }


def shapes_of(tree: PyTree[Array | jax.ShapeDtypeStruct]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every leaf by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves}


def sha256_of(leaf: Array | np.ndarray) -> str:
    """What described an array before there were many processes: the SHA-256 of all its bytes."""
    value = np.ascontiguousarray(leaf)
    return hashlib.sha256(value.view(np.uint8).data if value.ndim else value.tobytes()).hexdigest()


def _summed(leaf: Array | np.ndarray) -> tuple[int, int]:
    """The sums over the parts of an array that this process has to count."""
    first = second = 0
    for index, part in _parts(leaf):
        words = np.ascontiguousarray(part).reshape(-1).view(f"u{part.dtype.itemsize}")
        for start in range(0, words.size, BLOCK):
            stop = min(start + BLOCK, words.size)
            places = _places(np.arange(start, stop, dtype=np.uint64), part.shape, index, leaf.shape)
            mixed = words[start:stop].astype(np.uint64) + (places + np.uint64(1)) * _ODD[0]
            for shift, factor in ((30, _ODD[1]), (27, _ODD[2])):
                mixed = (mixed ^ (mixed >> np.uint64(shift))) * factor
            first += int(np.sum(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64))
            second += int(np.sum((mixed ^ (mixed >> np.uint64(33))) * _ODD[3], dtype=np.uint64))
    return first % 2**64, second % 2**64


def _parts(leaf: Array | np.ndarray) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Where each part begins that this process has to count, and the part: the first copy of those that several devices have."""
    if not isinstance(leaf, jax.Array):
        yield (0,) * leaf.ndim, leaf
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            yield (
                tuple(one.indices(size)[0] for one, size in zip(shard.index, leaf.shape, strict=True)),
                np.asarray(shard.data),
            )


def _places(within: np.ndarray, part: tuple[int, ...], begin: tuple[int, ...], whole: tuple[int, ...]) -> np.ndarray:
    """The places in a `whole` array of these places `within` a part of it."""
    if part == whole:
        return within
    places = np.zeros_like(within)
    for axis, size in enumerate(part):
        inside = within // np.uint64(math.prod(part[axis + 1 :])) % np.uint64(size)
        places += (inside + np.uint64(begin[axis])) * np.uint64(math.prod(whole[axis + 1 :]))
    return places
