"""Residual blocks, and stacks of them: transformer blocks after Gemma 2, pre-norm blocks after H-Net."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from estimators.base import Layout
from unet.attention import AbstractMixer, Attention, Surroundings, Visibility
from unet.cache import Cached, ChosenRows, NewRow, RowCache
from unet.cross import CrossLayer, Tokens
from unet.folding import Squares
from unet.layers import ROTARY_BASE, GeGLU, Linear, RMSNorm, Rotary, ScaleNorm, SwiGLU

Attends = Literal["none", "first", "every"]
"""Which blocks of a decoder attend to the tokens of the level inside."""


class AbstractBlock(eqx.Module):
    """One layer of a stack, causal and within documents; row by row as `AbstractMixer`."""

    @property
    @abstractmethod
    def rotary_dim(self) -> int | None:
        """How many dimensions of a head positions turn; None where positions play no part."""

    @abstractmethod
    def __call__(self, x: Float[Array, "batch length dim"], around: Surroundings) -> Float[Array, "batch length dim"]:
        """All rows at once."""

    @abstractmethod
    def prefill(self, x: Float[Array, "batch length dim"], around: Surroundings) -> Cached[PyTree[Array]]:
        """The same, and what `step` needs."""

    @abstractmethod
    def step(
        self, x: Float[Array, "batch 1 dim"], around: Surroundings, memory: PyTree[Array]
    ) -> Cached[PyTree[Array]]:
        """The next row of each sequence, and how the memory changes."""


class Block(AbstractBlock):
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

    @property
    def rotary_dim(self) -> int | None:
        return self.attention.rotary_dim

    @eqx.filter_jit
    def __call__(self, x: Float[Array, "batch length dim"], around: Surroundings) -> Float[Array, "batch length dim"]:
        return self._after(x, self.attention(self.before_attention(x), around))

    @eqx.filter_jit
    def prefill(self, x: Float[Array, "batch length dim"], around: Surroundings) -> Cached[RowCache]:
        attended = self.attention.prefill(self.before_attention(x), around)
        return Cached(self._after(x, attended.hidden), attended.memory)

    @eqx.filter_jit
    def step(
        self, x: Float[Array, "batch 1 dim"], around: Surroundings, memory: RowCache | ChosenRows
    ) -> Cached[NewRow]:
        attended = self.attention.step(self.before_attention(x), around, memory)
        return Cached(self._after(x, attended.hidden), attended.memory)

    def _after(self, x: Float[Array, "batch length dim"], mixed: Float[Array, "batch length dim"]) -> Array:
        """What follows attention."""
        x = x + self.after_attention(mixed)
        return x + self.after_mlp(self.mlp(self.before_mlp(x)))


class PreNorm(AbstractBlock):
    r"""$x \mathrel{+}= \mathrm{mixer}(N(x))$ and, where there is an MLP, $x \mathrel{+}= \mathrm{mlp}(N(x))$ (H-Net).

    Sums keep the dtype of x; mixer and MLP work in the compute dtype.
    """

    before_mixer: ScaleNorm
    mixer: AbstractMixer
    before_mlp: ScaleNorm | None
    mlp: SwiGLU | None

    def __init__(self, dim: int, mixer: AbstractMixer, mlp: SwiGLU | None):
        """Around a mixer and an MLP of width `dim`, or a mixer alone."""
        self.before_mixer, self.mixer = ScaleNorm(dim), mixer
        self.before_mlp, self.mlp = (None, None) if mlp is None else (ScaleNorm(dim), mlp)

    @property
    def rotary_dim(self) -> int | None:
        return self.mixer.rotary_dim

    @eqx.filter_jit
    def __call__(self, x: Float[Array, "batch length dim"], around: Surroundings) -> Float[Array, "batch length dim"]:
        return self._after(x, self.mixer(self.before_mixer(x).astype(around.compute), around), around)

    @eqx.filter_jit
    def prefill(self, x: Float[Array, "batch length dim"], around: Surroundings) -> Cached[PyTree[Array]]:
        mixed = self.mixer.prefill(self.before_mixer(x).astype(around.compute), around)
        return Cached(self._after(x, mixed.hidden, around), mixed.memory)

    @eqx.filter_jit
    def step(
        self, x: Float[Array, "batch 1 dim"], around: Surroundings, memory: PyTree[Array]
    ) -> Cached[PyTree[Array]]:
        mixed = self.mixer.step(self.before_mixer(x).astype(around.compute), around, memory)
        return Cached(self._after(x, mixed.hidden, around), mixed.memory)

    def _after(
        self, x: Float[Array, "batch length dim"], mixed: Float[Array, "batch length dim"], around: Surroundings
    ) -> Array:
        """What follows the mixer."""
        x = x + mixed.astype(x.dtype)
        if self.mlp is None or self.before_mlp is None:
            return x
        return x + self.mlp(self.before_mlp(x).astype(around.compute)).astype(x.dtype)


class Attending(AbstractBlock):
    r"""Every row attends to the vectors that its token is unfolded into, and then goes through another block (BLT's decoder).

    $x_i \leftarrow \mathrm{block}(\mathrm{CrossLayer}(x_i, \{u_{m,1} \dots u_{m,k}\}))$, with u the vectors that `Stack.unfold`
    makes of token $m = \mathrm{token\_of}(i)$. Keys and values are made once a token.
    """

    cross: CrossLayer
    block: AbstractBlock

    @property
    def rotary_dim(self) -> int | None:
        return self.block.rotary_dim

    @eqx.filter_jit
    def __call__(self, x: Float[Array, "batch length dim"], around: Surroundings) -> Float[Array, "batch length dim"]:
        return self.block(self._informed(x, around), around)

    @eqx.filter_jit
    def prefill(self, x: Float[Array, "batch length dim"], around: Surroundings) -> Cached[PyTree[Array]]:
        return self.block.prefill(self._informed(x, around), around)

    @eqx.filter_jit
    def step(
        self, x: Float[Array, "batch 1 dim"], around: Surroundings, memory: PyTree[Array]
    ) -> Cached[PyTree[Array]]:
        return self.block.step(self._informed(x, around), around, memory)

    def _informed(self, x: Float[Array, "batch length dim"], around: Surroundings) -> Float[Array, "batch length dim"]:
        assert around.tokens is not None
        vectors = around.tokens.outputs
        apart = vectors.reshape(*vectors.shape[:2], -1, x.shape[-1])
        made = self.cross.keys_values(apart).reshape(*vectors.shape[:2], -1)
        spread = around.tokens.spread(made).reshape(*x.shape[:2], -1, 2 * x.shape[-1])
        return self.cross.over_vectors(x, spread, around.compute)


class Stack(eqx.Module):
    """Blocks one after another, all with the same attention window.

    With a `norm` at the end the stream of residuals between the blocks is float32, whatever the dtype of the input, which the
    output has again (H-Net). `remat` keeps only the input of each block for the backward pass and computes the rest of it
    again. `unfold`, where there is one, makes of each token's output the vectors that `Attending` blocks look at, one after
    another (BLT).
    """

    blocks: tuple[AbstractBlock, ...]
    window: int | None = eqx.field(static=True)
    remat: bool = eqx.field(static=True)
    norm: ScaleNorm | None = None
    unfold: Linear | None = None
    rotary_base: float = eqx.field(static=True, default=ROTARY_BASE)

    def __init__(
        self,
        blocks: Sequence[AbstractBlock],
        *,
        window: int | None = None,
        remat: bool = False,
        norm: ScaleNorm | None = None,
        unfold: Linear | None = None,
        rotary_base: float = ROTARY_BASE,
    ):
        """`window`: how many rows attention sees, itself included; None for all before it. `rotary_base`: see `Rotary`. Raises
        `ValueError` for a window below 1, for blocks whose positions turn different numbers of dimensions, and where some
        attend to tokens and nothing unfolds them."""
        if window is not None and window < 1:
            raise ValueError(f"an attention window holds at least the row itself; got {window}")
        turned = {block.rotary_dim for block in blocks} - {None}
        if len(turned) > 1:
            raise ValueError(f"the blocks of a stack turn heads alike; got {sorted(map(str, turned))} dimensions")
        if unfold is None and any(isinstance(block, Attending) for block in blocks):
            raise ValueError("blocks that attend to tokens need the vectors that `unfold` makes of them")
        self.blocks = tuple(blocks)
        self.window, self.remat, self.norm, self.unfold = window, remat, norm, unfold
        self.rotary_base = rotary_base

    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        layout: Layout,
        squares: Squares | None = None,
        tokens: Tokens | None = None,
    ) -> Float[Array, "batch length dim"]:
        """`squares`: how rows of several sequences come apart, where they are folded. `tokens`: those of the level inside, where
        it `unfold`s them."""
        around = self._around(x, layout, squares, tokens)
        stream = self._widened(x)
        for block in self.blocks:
            call = eqx.filter_checkpoint(block) if self.remat else block
            stream = call(stream, around)
        return self._ended(stream, x)

    def prefill(
        self, x: Float[Array, "batch length dim"], layout: Layout, tokens: Tokens | None = None
    ) -> Cached[tuple[PyTree[Array], ...]]:
        """All rows at once, and what `step` needs to go on after those where `layout.mask` is True, which come first."""
        around, stream, memories = self._around(x, layout, None, tokens), self._widened(x), []
        for block in self.blocks:
            done = block.prefill(stream, around)
            stream = done.hidden
            memories.append(done.memory)
        return Cached(self._ended(stream, x), tuple(memories))

    def step(
        self,
        x: Float[Array, "batch 1 dim"],
        layout: Layout,
        memories: tuple[PyTree[Array], ...],
        tokens: Tokens | None = None,
    ) -> Cached[tuple[PyTree[Array], ...]]:
        """The next row of each sequence, and how the memories change."""
        around, stream, changes = self._around(x, layout, None, tokens, stepping=True), self._widened(x), []
        for block, memory in zip(self.blocks, memories, strict=True):
            done = block.step(stream, around, memory)
            stream = done.hidden
            changes.append(done.memory)
        return Cached(self._ended(stream, x), tuple(changes))

    def _widened(self, x: Float[Array, "batch length dim"]) -> Float[Array, "batch length dim"]:
        return x if self.norm is None else x.astype(jnp.float32)

    def _ended(self, stream: Float[Array, "batch length dim"], x: Float[Array, "batch length dim"]) -> Array:
        return stream if self.norm is None else self.norm(stream).astype(x.dtype)

    def _around(
        self,
        x: Float[Array, "batch length dim"],
        layout: Layout,
        squares: Squares | None,
        tokens: Tokens | None,
        *,
        stepping: bool = False,
    ) -> Surroundings:
        rotary = visibility = None
        turned = next((block.rotary_dim for block in self.blocks if block.rotary_dim is not None), None)
        if turned is not None:
            attended = layout if squares is None else squares.layout(layout)
            rotary = Rotary(attended.positions, turned, self.rotary_base)
            # A row that comes alone sees what its memory shows it.
            visibility = None if stepping else Visibility(attended, self.window)
        unfolded = None
        if self.unfold is not None:
            assert tokens is not None
            unfolded = tokens.replaced(self.unfold(tokens.outputs))
        squares = squares if turned is not None else None
        return Surroundings(layout, rotary, visibility, squares, unfolded, self.window, str(x.dtype))


def attending(stack: Stack, which: Attends, *, dim: int, heads: int, vectors: int, key: PRNGKeyArray) -> Stack:
    """The same stack, of rows and tokens of width `dim`, with its `first` block or `every` one attending to tokens, each of which
    is unfolded into so many `vectors`. Raises `ValueError` for a stack without blocks."""
    if which == "none":
        return stack
    if not stack.blocks:
        raise ValueError(f"there is no block that could attend to tokens, as {which!r} asks for")
    key_unfold, key_blocks = jax.random.split(key)
    unfold = Linear(dim, vectors * dim, key=key_unfold)
    changed = stack.blocks[:1] if which == "first" else stack.blocks
    keys = jax.random.split(key_blocks, len(changed))
    made = [Attending(CrossLayer(dim, heads, key=one), block) for one, block in zip(keys, changed, strict=True)]
    return Stack(
        [*made, *stack.blocks[len(made) :]],
        window=stack.window,
        remat=stack.remat,
        norm=stack.norm,
        unfold=unfold,
        rotary_base=stack.rotary_base,
    )


def transformer(
    layers: int,
    dim: int,
    heads: int,
    mlp_dim: int,
    *,
    window: int | None,
    remat: bool = False,
    key: PRNGKeyArray,
) -> Stack:
    """A stack of Gemma-2 blocks, with no norm at the end."""
    keys = jax.random.split(key, layers) if layers else ()
    return Stack([Block(dim, heads, mlp_dim, key=k) for k in keys], window=window, remat=remat)
