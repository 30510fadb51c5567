"""Transformer blocks after Gemma 2, and stacks of them."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from estimators.base import Layout
from unet.attention import Attention, Visibility
from unet.cache import Cached, NewRow, RowCache
from unet.folding import Squares
from unet.layers import GeGLU, RMSNorm, Rotary


class Block(eqx.Module):
    r"""$x \mathrel{+}= N(\mathrm{attention}(N(x)))$, $x \mathrel{+}= N(\mathrm{mlp}(N(x)))$, each N its own RMSNorm (Gemma 2)."""

    before_attention: RMSNorm
    attention: Attention
    after_attention: RMSNorm
    before_mlp: RMSNorm
    mlp: GeGLU
    after_mlp: RMSNorm

    def __init__(self, dim: int, heads: int, mlp_dim: int, *, key: PRNGKeyArray):
        key_attention, key_mlp = jax.random.split(key)
        self.before_attention, self.after_attention = RMSNorm(dim), RMSNorm(dim)
        self.before_mlp, self.after_mlp = RMSNorm(dim), RMSNorm(dim)
        self.attention = Attention(dim, heads, key=key_attention)
        self.mlp = GeGLU(dim, mlp_dim, key=key_mlp)

    @eqx.filter_jit
    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        rotary: Rotary,
        visibility: Visibility,
        squares: Squares | None = None,
    ) -> Float[Array, "batch length dim"]:
        """Rows that are folded come apart for attention by `squares`, which `rotary` and `visibility` then describe."""
        return self._after(x, self.attention(self.before_attention(x), rotary, visibility, squares))

    @eqx.filter_jit
    def prefill(
        self,
        x: Float[Array, "batch length dim"],
        rotary: Rotary,
        visibility: Visibility,
        lengths: Int[Array, " batch"],
        window: int | None,
    ) -> Cached[RowCache]:
        """The same, and a cache of the first `lengths` rows of each sequence, or of the last of them that a `window` sees."""
        attended = self.attention.prefill(self.before_attention(x), rotary, visibility, lengths, window)
        return Cached(self._after(x, attended.hidden), attended.memory)

    @eqx.filter_jit
    def step(self, x: Float[Array, "batch 1 dim"], rotary: Rotary, cache: RowCache) -> Cached[NewRow]:
        """The next row of each sequence."""
        attended = self.attention.step(self.before_attention(x), rotary, cache)
        return Cached(self._after(x, attended.hidden), attended.memory)

    def _after(self, x: Float[Array, "batch length dim"], mixed: Float[Array, "batch length dim"]) -> Array:
        """What follows attention."""
        x = x + self.after_attention(mixed)
        return x + self.after_mlp(self.mlp(self.before_mlp(x)))


class Stack(eqx.Module):
    """Blocks one after another, all with the same attention window; no norm at the end.

    `remat` keeps only the input of each block for the backward pass and computes the rest of it again.
    """

    blocks: tuple[Block, ...]
    window: int | None = eqx.field(static=True)
    remat: bool = eqx.field(static=True)

    def __init__(
        self,
        layers: int,
        dim: int,
        heads: int,
        mlp_dim: int,
        *,
        window: int | None,
        remat: bool = False,
        key: PRNGKeyArray,
    ):
        """`window`: how many rows attention sees, itself included; None for all before it. Raises `ValueError` for a
        window below 1."""
        if window is not None and window < 1:
            raise ValueError(f"an attention window holds at least the row itself; got {window}")
        self.blocks = tuple(Block(dim, heads, mlp_dim, key=k) for k in jax.random.split(key, layers)) if layers else ()
        self.window = window
        self.remat = remat

    def __call__(
        self, x: Float[Array, "batch length dim"], layout: Layout, squares: Squares | None = None
    ) -> Float[Array, "batch length dim"]:
        """`squares`: how rows of several sequences come apart, where they are folded."""
        if not self.blocks:
            return x
        attended = layout if squares is None else squares.layout(layout)
        rotary = self._rotary(attended.positions, x.shape[-1])
        visibility = Visibility(attended, self.window)
        for block in self.blocks:
            call = eqx.filter_checkpoint(block) if self.remat else block
            x = call(x, rotary, visibility, squares)
        return x

    def prefill(self, x: Float[Array, "batch length dim"], layout: Layout) -> Cached[tuple[RowCache, ...]]:
        """All rows at once, and what `step` needs to go on after those where `layout.mask` is True, which come first."""
        if not self.blocks:
            return Cached(x, ())
        rotary, visibility = self._rotary(layout.positions, x.shape[-1]), Visibility(layout, self.window)
        lengths = jnp.sum(layout.mask, axis=1, dtype=jnp.int32)
        caches = []
        for block in self.blocks:
            done = block.prefill(x, rotary, visibility, lengths, self.window)
            x = done.hidden
            caches.append(done.memory)
        return Cached(x, tuple(caches))

    def step(
        self, x: Float[Array, "batch 1 dim"], positions: Int[Array, "batch 1"], caches: tuple[RowCache, ...]
    ) -> Cached[tuple[NewRow, ...]]:
        """The next row of each sequence, at its position."""
        if not self.blocks:
            return Cached(x, ())
        rotary = self._rotary(positions, x.shape[-1])
        rows = []
        for block, cache in zip(self.blocks, caches, strict=True):
            done = block.step(x, rotary, cache)
            x = done.hidden
            rows.append(done.memory)
        return Cached(x, tuple(rows))

    def _rotary(self, positions: Int[Array, "batch length"], dim: int) -> Rotary:
        return Rotary(positions, dim // self.blocks[0].attention.heads)
