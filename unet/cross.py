"""Attention between the rows of a level and the tokens made of them, as BLT has it.

"BLT" is Pagnoni et al., "Byte latent transformer: patches scale better than tokens".
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from unet.folding import unfold
from unet.layers import Linear, ScaleNorm
from unet.ops import Implementation, token_of
from unet.ops.rows import bounds_of, spread_rows


class CrossLayer(eqx.Module):
    r"""$2x + W_o \sum_s w_s W_v N_y(y_s)$ per head, $w = \mathrm{softmax}_s(W_q N_x(x) \cdot W_k N_y(y_s) / \sqrt{d_h})$ (BLT).

    N are RMSNorms with a scale. Queries count twice, since BLT's program adds them inside the layer and once more around it. This
    is the layer without the choice of the rows y that each x sees: first `asked`, `keys_values`, then `joined`.
    """

    before_query: ScaleNorm
    before_rows: ScaleNorm
    query: Linear
    key_value: Linear
    out: Linear
    heads: int = eqx.field(static=True)

    def __init__(self, dim: int, heads: int, *, key: PRNGKeyArray):
        """Keys and values share one matrix, keys first. Raises `ValueError` where `heads` does not divide `dim`."""
        if heads < 1 or dim % heads:
            raise ValueError(f"{heads} heads do not divide a width of {dim}")
        key_query, key_rows, key_out = jax.random.split(key, 3)
        self.before_query, self.before_rows = ScaleNorm(dim), ScaleNorm(dim)
        self.query, self.out = Linear(dim, dim, key=key_query), Linear(dim, dim, key=key_out)
        self.key_value, self.heads = Linear(dim, 2 * dim, key=key_rows), heads

    def asked(self, x: Float[Array, "*rows dim"]) -> Float[Array, "*rows heads head_dim"]:
        """The queries of x."""
        return self.by_heads(self.query(self.before_query(x)))

    def keys_values(self, y: Float[Array, "*rows dim"]) -> Float[Array, "*rows two_dims"]:
        """The keys and values of y, side by side."""
        return self.key_value(self.before_rows(y))

    def joined(
        self, x: Float[Array, "*rows dim"], mixed: Float[Array, "*rows heads head_dim"]
    ) -> Float[Array, "*rows dim"]:
        """The layer's output, from the values that were `mixed` for each x; in the dtype of x."""
        return x + x + self.out(mixed.reshape(x.shape)).astype(x.dtype)

    def by_heads(self, rows: Float[Array, "*rows dim"]) -> Float[Array, "*rows heads head_dim"]:
        """The same numbers, head by head."""
        return rows.reshape(*rows.shape[:-1], self.heads, -1)

    def over_vectors(
        self,
        x: Float[Array, "batch length dim"],
        keys_values: Float[Array, "batch length vectors two_dims"],
        compute: str,
    ) -> Float[Array, "batch length dim"]:
        """The layer where every x sees a few vectors of its own. Products in `compute`, logits and softmax in float32."""
        query = self.asked(x.astype(compute))[:, :, None]
        keys, values = (self.by_heads(part) for part in jnp.split(keys_values, 2, axis=-1))
        logits = jnp.sum(query.astype(jnp.float32) * keys.astype(jnp.float32), axis=-1) * keys.shape[-1] ** -0.5
        weights = jax.nn.softmax(logits, axis=2)[..., None]
        mixed = jnp.sum(weights * values.astype(jnp.float32), axis=2)
        return self.joined(x, mixed.astype(compute))


class Tokens(eqx.Module):
    """What the rows of a level may look at: the `outputs` of its tokens, of which row i sees that of number `index_i`, the last
    one closed, its own included.

    Rows of several sequences may be folded (see `unet.folding`); `spread` takes them apart.
    """

    outputs: Float[Array, "groups tokens token_dim"]
    index: Int[Array, "groups length"]
    bounds: Int[Array, "groups edges"]
    batch: int = eqx.field(static=True)
    implementation: Implementation | None = eqx.field(static=True, default=None)

    def replaced(self, outputs: Float[Array, "groups tokens other_dim"]) -> Tokens:
        """The same tokens with other rows in place of their outputs."""
        return Tokens(outputs, self.index, self.bounds, self.batch, self.implementation)

    def spread(self, rows: Float[Array, "groups tokens some_dim"]) -> Float[Array, "batch length some_dim"]:
        """What belongs to each token at all rows that see it."""
        return unfold(spread_rows(rows, self.index, self.bounds, self.implementation), self.batch)


def tokens_seen(
    outputs: Float[Array, "groups tokens token_dim"],
    actions: Bool[Array, "groups length"],
    batch: int,
    implementation: Implementation | None,
) -> Tokens:
    """The tokens that the rows with these actions close, of `batch` sequences."""
    index = jnp.minimum(token_of(actions), outputs.shape[1] - 1)
    return Tokens(outputs, index, bounds_of(index, outputs.shape[1]), batch, implementation)


def last_seen(last: Float[Array, "batch 1 token_dim"]) -> Tokens:
    """The `last` token of each sequence, as its next row sees it."""
    index = jnp.zeros(last.shape[:2], jnp.int32)
    return Tokens(last, index, bounds_of(index, 1), last.shape[0])
