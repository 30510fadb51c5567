"""Hashed n-gram embeddings of the last few bytes, as in BLT (Pagnoni et al., "Byte latent transformer").

For the same ids the hash equals that of the released code. Without the `special` ids of a published model they differ in one
place: a document begins with that of BOS (byte 254) here and with another one there, so the first n-grams of a document, which
contain it, use other rows of the tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from estimators.base import BOS

PRIMES = (
    1_000_000_007,
    5_915_587_277,
    1_500_450_271,
    3_267_000_013,
    5_754_853_343,
    4_093_082_899,
    9_576_890_767,
    3_628_273_133,
    2_860_486_313,
    5_463_458_053,
    3_367_900_313,
)
"""Bases of BLT's polynomial hash functions."""

OFFSET = 4
"""Number of special ids in BLT's code: byte b has the id b + 4."""

MAX_NGRAM = 64
MAX_OFFSET = 512
"""Largest length of an n-gram and largest `offset` with which `rolling_hash` cannot overflow 32 bits."""


def rolling_hash(ids: Int[Array, "*shape bytes"], buckets: int, prime: int = PRIMES[0]) -> Int[Array, "*shape"]:
    r"""$\big(\sum_{j=0}^{n-1} t_j\, a^j\big) \bmod \mathrm{buckets}$ of n ids, the oldest first, a = `prime` (BLT).

    As in the released code, the sum is a signed 64-bit integer that wraps around, and the remainder is not negative. Ids lie in
    0 … 767, n is at most 64, buckets at most $2^{31}$. Only 32-bit arithmetic is used: the sum has four parts of 16 bits, and
    the remainder is computed digit by digit.
    """
    parts = [jnp.zeros(ids.shape[:-1], jnp.uint32) for _ in range(4)]
    for place in range(ids.shape[-1]):
        power, one = pow(prime, place, 2**64), ids[..., place].astype(jnp.uint32)
        parts = [part + one * jnp.uint32(power >> 16 * number & 0xFFFF) for number, part in enumerate(parts)]
    for number in range(3):
        parts[number + 1] = parts[number + 1] + (parts[number] >> 16)
    parts = [part & 0xFFFF for part in parts]
    size = jnp.uint32(buckets)
    digit = next(bits for bits in (16, 8, 4, 2, 1) if buckets << bits <= 2**32)
    rest = jnp.zeros_like(parts[0])
    for part, shift in itertools.product(reversed(parts), range(16 - digit, -1, -digit)):
        rest = ((rest << digit) + (part >> shift & (1 << digit) - 1)) % size
    # With the highest bit set, the signed number is smaller by 2^64.
    negative = (rest + jnp.uint32(-(2**64) % buckets)) % size
    return jnp.where(parts[3] >= 0x8000, negative, rest).astype(jnp.int32)


class HashedNgrams(eqx.Module):
    r"""$\sum_f \sum_n E_{f,n}[\mathrm{hash}_f(t_{i-n+1} \dots t_i)]$, to be added to the embedding of byte i (BLT).

    There is one table for each hash function f and each n, in the order of f, then n; different n-grams may share a row. Byte b
    has the id b + `offset`; those from BOS on have the `special` ids, if there are any. Positions before a document's first byte
    have the id 0.
    """

    tables: tuple[Float[Array, "buckets dim"], ...]
    sizes: tuple[int, ...] = eqx.field(static=True)
    primes: tuple[int, ...] = eqx.field(static=True)
    offset: int = eqx.field(static=True)
    special: tuple[int, ...] = eqx.field(static=True, default=())

    def __init__(
        self,
        dim: int,
        sizes: Sequence[int],
        buckets: int,
        *,
        functions: int = 1,
        offset: int = OFFSET,
        special: Sequence[int] = (),
        std: float = 1.0,
        key: PRNGKeyArray,
    ):
        """`sizes`: the values of n; `buckets`: rows of each table; `functions`: number of hash functions, with BLT's primes.
        `std` should equal that of the byte embeddings: both are $d^{-1/2}$ in BLT and 1 in `UNet`. Raises `ValueError` for n
        below 2 or above 64, for tables with no rows or more than $2^{31}$, for no hash function or more than there are primes,
        and for an offset or special ids outside 0 … 512."""
        if not sizes or min(sizes) < 2 or max(sizes) > MAX_NGRAM or not 1 <= buckets <= 2**31:
            raise ValueError(
                f"n-grams must have two bytes or more, at most {MAX_NGRAM}, tables one row or more, at most 2^31; got "
                f"{tuple(sizes)} and {buckets}"
            )
        ids = (offset, *special)
        if not 1 <= functions <= len(PRIMES) or not 0 <= min(ids) <= max(ids) <= MAX_OFFSET:
            raise ValueError(
                f"there must be 1 to {len(PRIMES)} hash functions, and an offset and special ids from 0 to {MAX_OFFSET}; got "
                f"{functions} and {ids}"
            )
        keys = jax.random.split(key, functions * len(sizes))
        self.tables = tuple(std * jax.random.normal(one, (buckets, dim), jnp.float32) for one in keys)
        self.sizes, self.primes, self.offset, self.special = tuple(sizes), PRIMES[:functions], offset, tuple(special)

    @property
    def reach(self) -> int:
        """How many bytes before its own a position looks back at."""
        return max(self.sizes) - 1

    def ids(self, bytes: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """The ids that are hashed."""
        if not self.special:
            return bytes + self.offset
        special = jnp.asarray(self.special, jnp.int32)
        return jnp.where(bytes < BOS, bytes + self.offset, special[jnp.clip(bytes - BOS, 0, special.size - 1)])

    def __call__(
        self,
        bytes: Int[Array, "batch length"],
        document_positions: Int[Array, "batch length"],
        before: Int[Array, "batch reach"] | None = None,
    ) -> Float[Array, "batch length dim"]:
        """`document_positions`: the index of each position in its document, from 0. `before`: the bytes before the first
        position, if there are any."""
        if before is None:
            before = jnp.zeros((bytes.shape[0], self.reach), bytes.dtype)
        ids, length = self.ids(jnp.concatenate([before, bytes], axis=1).astype(jnp.int32)), bytes.shape[1]
        # back[k] holds, for each position, the id that lies k positions back.
        back = [ids[:, self.reach - k : self.reach - k + length] for k in range(self.reach + 1)]
        back = [jnp.where(document_positions >= k, shifted, 0) for k, shifted in enumerate(back)]
        total = jnp.zeros((*bytes.shape, self.tables[0].shape[1]), self.tables[0].dtype)
        for (prime, size), table in zip(itertools.product(self.primes, self.sizes), self.tables, strict=True):
            window = jnp.stack(back[size - 1 :: -1], axis=-1)
            total = total + table[rolling_hash(window, table.shape[0], prime)]
        return total
