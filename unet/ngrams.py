"""Embeddings of the last few bytes, looked up by a hash (Pagnoni et al., "Byte latent transformer")."""

from __future__ import annotations

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

MULTIPLIER = 2_654_435_761
"""The prime at which the polynomial of a hash is evaluated, modulo 2^32."""


def rolling_hash(windows: Int[Array, "*rows bytes"], buckets: int) -> Int[Array, "*rows"]:
    r"""$\big(\sum_{j=1}^{n} b_{i-j+1}\, a^{j-1} \bmod 2^{32}\big) \bmod \mathrm{buckets}$ of n bytes, the newest last."""
    total = jnp.zeros(windows.shape[:-1], jnp.uint32)
    for place in range(windows.shape[-1]):
        total = total * jnp.uint32(MULTIPLIER) + windows[..., place].astype(jnp.uint32)
    return (total % jnp.uint32(buckets)).astype(jnp.int32)


class HashedNgrams(eqx.Module):
    r"""$\sum_n E_n[\mathrm{hash}(x_{i-n+1} \dots x_i)]$, to be added to the embedding of byte i; a table for each n.

    Different n-grams may share a row. At the first bytes of a document only those n count for which there are n bytes.
    """

    tables: tuple[Float[Array, "buckets dim"], ...]
    sizes: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, dim: int, sizes: Sequence[int], buckets: int, *, key: PRNGKeyArray):
        """`sizes` n, `buckets` rows a table. Tables start small beside the byte's own embedding. Raises `ValueError` for
        n-grams of less than two bytes and for tables without rows."""
        if not sizes or min(sizes) < 2 or buckets < 1:
            raise ValueError(
                f"n-grams have two bytes or more, tables one row or more; got {tuple(sizes)} and {buckets}"
            )
        keys = jax.random.split(key, len(sizes))
        self.tables = tuple(0.02 * jax.random.normal(one, (buckets, dim)) for one in keys)
        self.sizes = tuple(sizes)

    @property
    def reach(self) -> int:
        """Bytes before its own that a row looks at."""
        return max(self.sizes) - 1

    def __call__(
        self,
        bytes: Int[Array, "batch length"],
        numbers: Int[Array, "batch length"],
        before: Int[Array, "batch reach"] | None = None,
    ) -> Float[Array, "batch length dim"]:
        """`numbers`: the place of each row in its document, from 0. `before`: the bytes before the first row, where there are
        any."""
        if before is None:
            before = jnp.zeros((bytes.shape[0], self.reach), bytes.dtype)
        whole, length = jnp.concatenate([before, bytes], axis=1), bytes.shape[1]
        total = jnp.zeros((*bytes.shape, self.tables[0].shape[1]), self.tables[0].dtype)
        for size, table in zip(self.sizes, self.tables, strict=True):
            first = self.reach - size + 1
            window = jnp.stack([whole[:, first + place : first + place + length] for place in range(size)], axis=-1)
            found = table[rolling_hash(window, table.shape[0])]
            total = total + jnp.where((numbers >= size - 1)[..., None], found, jnp.zeros((), found.dtype))
        return total
