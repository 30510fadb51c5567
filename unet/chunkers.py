"""Ways from byte rows to token rows and back, on top of the ragged ops."""

import dataclasses
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from estimators.base import AbstractChunker, Boundaries, Joined, TokenRows
from unet.ops import Implementation, downsample, mean_pool, smooth, token_of, upsample
from unet.ops.smooth import smooth_step


def last_of(values: Float[Array, "batch tokens dim"], rows: TokenRows) -> Float[Array, "batch 1 dim"]:
    """The value of the last token of each sequence, zero where it has none."""
    last = (rows.lengths - 1)[:, None, None]
    return jnp.where(last >= 0, jnp.take_along_axis(values, jnp.maximum(last, 0), axis=1, mode="clip"), 0.0)


def renewed(
    boundaries: Boundaries, new: Float[Array, "batch 1 dim"], old: Float[Array, "batch 1 dim"]
) -> Float[Array, "batch 1 dim"]:
    """The `new` rows where there is a boundary, the `old` ones elsewhere."""
    return jnp.where(boundaries.actions[..., None], new, old)


class SelectDistribute(AbstractChunker):
    r"""Select the rows at boundaries; add each token's output to the bytes that follow it (SFE eq. 7-8).

    $X'_m = X_{i_m}$, $Y_i = X_i + Y'_{\mathrm{token\_of}(i)}$. No gradient reaches the boundaries.
    """

    implementation: Implementation | None = eqx.field(static=True, default=None)

    def down(self, hidden: Float[Array, "batch length dim"], boundaries: Boundaries, *, capacity: int) -> TokenRows:
        return downsample(hidden, boundaries.actions, capacity, implementation=self.implementation)

    def up(
        self,
        outputs: Float[Array, "batch tokens dim"],
        rows: TokenRows,
        hidden: Float[Array, "batch length dim"],
        boundaries: Boundaries,
    ) -> Float[Array, "batch length dim"]:
        return hidden + upsample(outputs, boundaries.actions, implementation=self.implementation)

    def remember(
        self,
        outputs: Float[Array, "batch tokens dim"],
        rows: TokenRows,
        hidden: Float[Array, "batch length dim"],
        boundaries: Boundaries,
        mask: Bool[Array, "batch length"],
    ) -> Float[Array, "batch 1 dim"]:
        """The last token's output."""
        return last_of(outputs, rows)

    def down_step(
        self, hidden: Float[Array, "batch 1 dim"], boundaries: Boundaries, memory: Float[Array, "batch 1 dim"]
    ) -> Float[Array, "batch 1 dim"]:
        return hidden

    def up_step(
        self,
        output: Float[Array, "batch 1 dim"],
        value: Float[Array, "batch 1 dim"],
        hidden: Float[Array, "batch 1 dim"],
        boundaries: Boundaries,
        memory: Float[Array, "batch 1 dim"],
    ) -> Joined:
        last = renewed(boundaries, output, memory)
        return Joined(hidden + last, last)


class SelectDeviate(AbstractChunker):
    r"""As `SelectDistribute`, but adds only what the token level changed (an earlier version of the authors' code).

    $Y_i = X_i + (Y' - X')_{\mathrm{token\_of}(i)}$.
    """

    implementation: Implementation | None = eqx.field(static=True, default=None)

    def down(self, hidden: Float[Array, "batch length dim"], boundaries: Boundaries, *, capacity: int) -> TokenRows:
        return downsample(hidden, boundaries.actions, capacity, implementation=self.implementation)

    def up(
        self,
        outputs: Float[Array, "batch tokens dim"],
        rows: TokenRows,
        hidden: Float[Array, "batch length dim"],
        boundaries: Boundaries,
    ) -> Float[Array, "batch length dim"]:
        return hidden + upsample(outputs - rows.values, boundaries.actions, implementation=self.implementation)

    def remember(
        self,
        outputs: Float[Array, "batch tokens dim"],
        rows: TokenRows,
        hidden: Float[Array, "batch length dim"],
        boundaries: Boundaries,
        mask: Bool[Array, "batch length"],
    ) -> Float[Array, "batch 1 dim"]:
        """What the token level changed in the last token."""
        return last_of(outputs - rows.values, rows)

    def down_step(
        self, hidden: Float[Array, "batch 1 dim"], boundaries: Boundaries, memory: Float[Array, "batch 1 dim"]
    ) -> Float[Array, "batch 1 dim"]:
        return hidden

    def up_step(
        self,
        output: Float[Array, "batch 1 dim"],
        value: Float[Array, "batch 1 dim"],
        hidden: Float[Array, "batch 1 dim"],
        boundaries: Boundaries,
        memory: Float[Array, "batch 1 dim"],
    ) -> Joined:
        last = renewed(boundaries, output - value, memory)
        return Joined(hidden + last, last)


class OpenGroup(eqx.Module):
    """The rows since the last boundary, which no boundary has closed yet: their float32 `total` and their `count`; and the
    output of the `last` token."""

    total: Float[Array, "batch 1 dim"]
    count: Int[Array, " batch"]
    last: Float[Array, "batch 1 dim"]


class MeanPool(AbstractChunker):
    r"""The mean of each closed group; a learned null group stands before the first (DPT; authors' code).

    The null group takes the row of the boundary that every document's start is forced to have: what a byte sees before any
    boundary was drawn. Rows after the last boundary are in no token. Gradients reach the boundaries through the means, by
    way of `Boundaries.relaxed`.
    """

    null: Float[Array, " dim"]
    implementation: Implementation | None = eqx.field(static=True)

    def __init__(self, dim: int, *, key: PRNGKeyArray, implementation: Implementation | None = None):
        """The null group of states of width `dim` is drawn from a standard normal: where it stands alone, norms would
        multiply the gradient of a zero a thousandfold, block after block."""
        self.null = jax.random.normal(key, (dim,))
        self.implementation = implementation

    def down(self, hidden: Float[Array, "batch length dim"], boundaries: Boundaries, *, capacity: int) -> TokenRows:
        rows = mean_pool(
            hidden,
            boundaries.actions,
            capacity,
            starts=boundaries.starts,
            relaxed=boundaries.relaxed,
            implementation=self.implementation,
        )
        first = jnp.take_along_axis(boundaries.starts, rows.positions, axis=1, mode="clip") & rows.mask
        values = jnp.where(first[..., None], self.null.astype(hidden.dtype), rows.values)
        return dataclasses.replace(rows, values=values)

    def up(
        self,
        outputs: Float[Array, "batch tokens dim"],
        rows: TokenRows,
        hidden: Float[Array, "batch length dim"],
        boundaries: Boundaries,
    ) -> Float[Array, "batch length dim"]:
        closed = token_of(boundaries.actions)[..., None] >= 0
        back = upsample(outputs, boundaries.actions, implementation=self.implementation)
        return hidden + jnp.where(closed, back, self.null.astype(hidden.dtype))

    def remember(
        self,
        outputs: Float[Array, "batch tokens dim"],
        rows: TokenRows,
        hidden: Float[Array, "batch length dim"],
        boundaries: Boundaries,
        mask: Bool[Array, "batch length"],
    ) -> OpenGroup:
        last_boundary = jnp.max(
            jnp.where(boundaries.actions & ~boundaries.starts, jnp.arange(mask.shape[1]), -1), axis=1
        )
        inside = (jnp.arange(mask.shape[1]) > last_boundary[:, None]) & mask
        total = jnp.sum(jnp.where(inside[..., None], hidden.astype(jnp.float32), 0.0), axis=1, keepdims=True)
        return OpenGroup(total, jnp.sum(inside, axis=1, dtype=jnp.int32), last_of(outputs, rows))

    def down_step(
        self, hidden: Float[Array, "batch 1 dim"], boundaries: Boundaries, memory: OpenGroup
    ) -> Float[Array, "batch 1 dim"]:
        count = (memory.count + 1)[:, None, None].astype(jnp.float32)
        return ((memory.total + hidden.astype(jnp.float32)) / count).astype(hidden.dtype)

    def up_step(
        self,
        output: Float[Array, "batch 1 dim"],
        value: Float[Array, "batch 1 dim"],
        hidden: Float[Array, "batch 1 dim"],
        boundaries: Boundaries,
        memory: OpenGroup,
    ) -> Joined:
        last = renewed(boundaries, output, memory.last)
        total = renewed(boundaries, jnp.zeros_like(memory.total), memory.total + hidden.astype(jnp.float32))
        count = jnp.where(boundaries.actions[:, 0], 0, memory.count + 1)
        return Joined(hidden + last, OpenGroup(total, count, last))


class Projection(eqx.Module):
    """H-Net's residual projection: a linear layer with a bias, in float32, its weight zero at first (H-Net eq. 3)."""

    weight: Float[Array, "dim dim"]
    bias: Float[Array, " dim"]

    def __init__(self, dim: int, *, key: PRNGKeyArray | None = None):
        """A projection of states of width `dim`. With a key the bias starts as in the released program, which leaves it as
        PyTorch draws it: uniform within `dim**-0.5`; without one it starts at zero."""
        self.weight, bound = jnp.zeros((dim, dim)), dim**-0.5
        self.bias = jnp.zeros(dim) if key is None else jax.random.uniform(key, (dim,), minval=-bound, maxval=bound)

    def __call__(self, hidden: Float[Array, "batch length dim"]) -> Float[Array, "batch length dim"]:
        """In float32."""
        return hidden.astype(jnp.float32) @ self.weight.T + self.bias


class SelectSmooth(AbstractChunker):
    r"""Select rows at boundaries; smooth the tokens, weight them by confidence, bring them back (H-Net eq. 5-9).

    $Y_i = r(X_i) + w_i\,\bar z_{\mathrm{token\_of}(i)}$, with $\bar z$ the average that `unet.ops.smooth` takes over the token
    outputs with the probabilities of their boundaries (`smoothing` False: the outputs themselves), $w_i$ by `weighting`:
    `straight-through`, 1 with the gradient of the confidence $c_i$; `confidence`, $c_i$ itself; `none`, 1. The residual r is
    the identity, or the `projection` where there is one; then the sum is float32, and only its result has the dtype of X.
    """

    projection: Projection | None = None
    smoothing: bool = eqx.field(static=True, default=True)
    weighting: Literal["straight-through", "confidence", "none"] = eqx.field(static=True, default="straight-through")
    implementation: Implementation | None = eqx.field(static=True, default=None)

    def down(self, hidden: Float[Array, "batch length dim"], boundaries: Boundaries, *, capacity: int) -> TokenRows:
        return downsample(hidden, boundaries.actions, capacity, implementation=self.implementation)

    def up(
        self,
        outputs: Float[Array, "batch tokens dim"],
        rows: TokenRows,
        hidden: Float[Array, "batch length dim"],
        boundaries: Boundaries,
    ) -> Float[Array, "batch length dim"]:
        back = upsample(
            self.averaged(outputs, rows, boundaries), boundaries.actions, implementation=self.implementation
        )
        return self.joined(back, hidden, boundaries)

    def averaged(
        self, outputs: Float[Array, "batch tokens dim"], rows: TokenRows, boundaries: Boundaries
    ) -> Float[Array, "batch tokens dim"]:
        r"""$\bar z$."""
        if not self.smoothing:
            return outputs
        probs = jnp.take_along_axis(boundaries.probs, rows.positions, axis=1, mode="clip")
        starts = jnp.take_along_axis(boundaries.starts, rows.positions, axis=1, mode="clip")
        return smooth(outputs, probs, starts, implementation=self.implementation)

    def joined(
        self,
        back: Float[Array, "batch length dim"],
        hidden: Float[Array, "batch length dim"],
        boundaries: Boundaries,
    ) -> Float[Array, "batch length dim"]:
        """Y, from the average at every byte."""
        if self.projection is not None:
            back = back.astype(jnp.float32)
        if self.weighting != "none":
            sure = boundaries.confidence
            if self.weighting == "straight-through":
                sure = 1.0 + (sure - jax.lax.stop_gradient(sure))
            back = back * sure.astype(back.dtype)[..., None]
        return (back + (hidden if self.projection is None else self.projection(hidden))).astype(hidden.dtype)

    def remember(
        self,
        outputs: Float[Array, "batch tokens dim"],
        rows: TokenRows,
        hidden: Float[Array, "batch length dim"],
        boundaries: Boundaries,
        mask: Bool[Array, "batch length"],
    ) -> Float[Array, "batch 1 dim"]:
        """The last average, in float32."""
        return last_of(self.averaged(outputs.astype(jnp.float32), rows, boundaries), rows)

    def down_step(
        self, hidden: Float[Array, "batch 1 dim"], boundaries: Boundaries, memory: Float[Array, "batch 1 dim"]
    ) -> Float[Array, "batch 1 dim"]:
        return hidden

    def up_step(
        self,
        output: Float[Array, "batch 1 dim"],
        value: Float[Array, "batch 1 dim"],
        hidden: Float[Array, "batch 1 dim"],
        boundaries: Boundaries,
        memory: Float[Array, "batch 1 dim"],
    ) -> Joined:
        new = output.astype(jnp.float32)
        if self.smoothing:
            new = smooth_step(new, boundaries.probs, memory)
        last = renewed(boundaries, new, memory)
        return Joined(self.joined(last.astype(output.dtype), hidden, boundaries), last)


class SelectAttend(AbstractChunker):
    r"""Select the rows at boundaries and bring nothing back: the decoder's blocks attend to the tokens themselves (BLT).

    $X'_m = X_{i_m}$, $Y_i = X_i$. For stages whose decoder has `Attending` blocks; without them the token level has no effect.
    """

    implementation: Implementation | None = eqx.field(static=True, default=None)

    def down(self, hidden: Float[Array, "batch length dim"], boundaries: Boundaries, *, capacity: int) -> TokenRows:
        return downsample(hidden, boundaries.actions, capacity, implementation=self.implementation)

    def up(
        self,
        outputs: Float[Array, "batch tokens token_dim"],
        rows: TokenRows,
        hidden: Float[Array, "batch length dim"],
        boundaries: Boundaries,
    ) -> Float[Array, "batch length dim"]:
        return hidden

    def remember(
        self,
        outputs: Float[Array, "batch tokens token_dim"],
        rows: TokenRows,
        hidden: Float[Array, "batch length dim"],
        boundaries: Boundaries,
        mask: Bool[Array, "batch length"],
    ) -> None:
        """Nothing."""

    def down_step(
        self, hidden: Float[Array, "batch 1 dim"], boundaries: Boundaries, memory: None
    ) -> Float[Array, "batch 1 dim"]:
        return hidden

    def up_step(
        self,
        output: Float[Array, "batch 1 token_dim"],
        value: Float[Array, "batch 1 token_dim"],
        hidden: Float[Array, "batch 1 dim"],
        boundaries: Boundaries,
        memory: None,
    ) -> Joined:
        return Joined(hidden, None)
