"""Cross-attention between the positions of a level and its tokens, as in BLT.

"BLT" is Pagnoni et al., "Byte latent transformer: patches scale better than tokens".
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from unet.layers import NORM_EPSILON, Linear, ScaleNorm, for_all_heads, require_heads
from unet.ops import Implementation, token_of
from unet.ops.rows import bounds_of, spread_rows


class CrossLayer(eqx.Module):
    r"""$2x + W_o \sum_s w_s W_v N_y(y_s)$ per head, $w = \mathrm{softmax}_s(W_q N_x(x) \cdot W_k N_y(y_s) / \sqrt{d_h})$ (BLT).

    N are RMSNorms with a scale. The residual counts twice because BLT's code adds x inside the layer and again around it. Groups
    of heads may share their keys and values. The caller selects the y that each x attends to: call `queries` and `keys_values`,
    attend, then call `output`.
    """

    before_query: ScaleNorm
    before_key_value: ScaleNorm
    query: Linear
    key_value: Linear
    out: Linear
    heads: int = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        epsilon: float = NORM_EPSILON,
        key: PRNGKeyArray,
    ):
        """Keys and values share one matrix, keys first; they have `kv_heads` heads (None: as many as the queries). `epsilon` is
        that of the norms. Raises `ValueError` if `heads` does not divide `dim`, or `kv_heads` not `heads`."""
        kv_heads = require_heads(dim, heads, kv_heads)
        key_query, key_key_value, key_out = jax.random.split(key, 3)
        self.before_query, self.before_key_value = ScaleNorm(dim, epsilon), ScaleNorm(dim, epsilon)
        self.query, self.out = Linear(dim, dim, key=key_query), Linear(dim, dim, key=key_out)
        self.key_value, self.heads = Linear(dim, 2 * kv_heads * (dim // heads), key=key_key_value), heads

    @property
    def head_dim(self) -> int:
        return self.query.weight.shape[1] // self.heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.key_value.weight.shape[1] // (2 * self.head_dim)

    def queries(self, x: Float[Array, "*shape dim"]) -> Float[Array, "*shape heads head_dim"]:
        """The queries of x."""
        return self.split_heads(self.query(self.before_query(x)))

    def keys_values(self, y: Float[Array, "*shape dim"]) -> Float[Array, "*shape width"]:
        """The keys and values of y, concatenated."""
        return self.key_value(self.before_key_value(y))

    def output(
        self, x: Float[Array, "*shape dim"], attended: Float[Array, "*shape heads head_dim"]
    ) -> Float[Array, "*shape dim"]:
        """The layer's output, in the dtype of x; `attended` are the weighted values of each x."""
        return x + x + self.out(attended.reshape(x.shape)).astype(x.dtype)

    def split_heads(self, x: Float[Array, "*shape dim"]) -> Float[Array, "*shape heads head_dim"]:
        """The last axis split into heads."""
        return x.reshape(*x.shape[:-1], -1, self.head_dim)

    def attend_vectors(
        self,
        x: Float[Array, "batch length dim"],
        keys_values: Float[Array, "batch length vectors width"],
        compute: str,
    ) -> Float[Array, "batch length dim"]:
        """The layer where every x attends to a few vectors of its own. Products in `compute`, logits and softmax in float32."""
        query = self.queries(x.astype(compute))[:, :, None]
        parts = (self.split_heads(part) for part in jnp.split(keys_values, 2, axis=-1))
        keys, values = (for_all_heads(part, self.heads, 3) for part in parts)
        # (b, length, vectors, heads)
        logits = jnp.sum(query.astype(jnp.float32) * keys.astype(jnp.float32), axis=-1) * keys.shape[-1] ** -0.5
        weights = jax.nn.softmax(logits, axis=2)[..., None]
        attended = jnp.sum(weights * values.astype(jnp.float32), axis=2)
        return self.output(x, attended.astype(compute))


class VisibleTokens(eqx.Module):
    """The tokens that the positions of a level attend to: their `outputs`, and for each position the `index` of the last token
    closed at or before it. `bounds`: see `unet.ops.rows.bounds_of`."""

    outputs: Float[Array, "batch tokens token_dim"]
    index: Int[Array, "batch length"]
    bounds: Int[Array, "batch edges"]
    implementation: Implementation | None = eqx.field(static=True, default=None)

    def replaced(self, outputs: Float[Array, "batch tokens other_dim"]) -> VisibleTokens:
        """The same tokens with other outputs."""
        return VisibleTokens(outputs, self.index, self.bounds, self.implementation)

    def spread(self, values: Float[Array, "batch tokens some_dim"]) -> Float[Array, "batch length some_dim"]:
        """Each token's values, copied to all positions that see it."""
        return spread_rows(values, self.index, self.bounds, self.implementation)


def visible_tokens(
    outputs: Float[Array, "batch tokens token_dim"],
    actions: Bool[Array, "batch length"],
    implementation: Implementation | None,
    last: Float[Array, "batch 1 token_dim"] | None = None,
) -> VisibleTokens:
    """The tokens that these actions close, after the `last` one closed earlier if there is one."""
    index = token_of(actions)
    if last is not None:
        outputs, index = jnp.concatenate([last.astype(outputs.dtype), outputs], axis=1), index + 1
    index = jnp.minimum(index, outputs.shape[1] - 1)
    return VisibleTokens(outputs, index, bounds_of(index, outputs.shape[1]), implementation)
