"""Transformer blocks after Gemma 2, and stacks of them."""

from __future__ import annotations

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from estimators.base import Layout
from unet.attention import Attention, Visibility
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
        x = x + self.after_attention(self.attention(self.before_attention(x), rotary, visibility, squares))
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
        rotary = Rotary(attended.positions, x.shape[-1] // self.blocks[0].attention.heads)
        visibility = Visibility(attended, self.window)
        for block in self.blocks:
            call = eqx.filter_checkpoint(block) if self.remat else block
            x = call(x, rotary, visibility, squares)
        return x
