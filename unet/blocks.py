"""Residual blocks and stacks of them: transformer blocks as in Gemma 2, pre-norm blocks as in H-Net."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from estimators.base import Layout
from unet.attention import AbstractMixer, Attention, BlockContext, LayerOutput, Visibility
from unet.cross import CrossLayer, VisibleTokens
from unet.decoding.kv_cache import is_unallocated
from unet.experts import Experts
from unet.fused_attention import AttentionForm
from unet.gathering import Division, gathered, keeps_activations
from unet.layers import (
    MLP,
    NORM_EPSILON,
    ROTARY_BASE,
    GeGLU,
    LayerNorm,
    Linear,
    RMSNorm,
    Rotary,
    RotaryScaling,
    ScaleNorm,
    SwiGLU,
    with_fields,
)
from unet.ops.mosaic import Implementation
from unet.tensor import shared

Attends = Literal["none", "first", "every"]
"""Which blocks of a decoder attend to the tokens of the inner level."""


class AbstractBlock(eqx.Module):
    """One layer of a stack: causal, within documents, with a decode state as in `AbstractMixer`."""

    @property
    @abstractmethod
    def rotary_dim(self) -> int | None:
        """Dimensions of a head with rotary embeddings; None if positions are not used."""

    @abstractmethod
    def init_state(self, batch: int, window: int | None) -> PyTree[Array]:
        """The decode state before the first position."""

    @abstractmethod
    def __call__(
        self, x: Float[Array, "batch length dim"], context: BlockContext, state: PyTree[Array] = None
    ) -> LayerOutput:
        """The new hidden states, and the update of `state`."""


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

    def init_state(self, batch: int, window: int | None) -> PyTree[Array]:
        return self.attention.init_state(batch, window)

    @eqx.filter_jit
    def __call__(
        self, x: Float[Array, "batch length dim"], context: BlockContext, state: PyTree[Array] = None
    ) -> LayerOutput:
        way = context.implementation
        x, inputs = self.before_attention.beside(x, way)
        mixed = self.attention(inputs, context, state)
        x, inputs = self.before_mlp.beside(self.after_attention.added_to(x, mixed.hidden, way), way)
        return LayerOutput(self.after_mlp.added_to(x, self.mlp(inputs, way), way), mixed.update)


class PreNorm(AbstractBlock):
    r"""$x \mathrel{+}= \mathrm{mixer}(N(x))$ and, if there is an MLP or a mixture of experts, $x \mathrel{+}= \mathrm{mlp}(N(x))$
    (H-Net, Llama, GPT-2).

    The residual stream keeps the dtype of x; mixer and MLP work in the compute dtype.
    """

    before_mixer: ScaleNorm | LayerNorm
    mixer: AbstractMixer
    before_mlp: ScaleNorm | LayerNorm | None
    mlp: SwiGLU | MLP | Experts | None

    def __init__(
        self,
        dim: int,
        mixer: AbstractMixer,
        mlp: SwiGLU | MLP | Experts | None,
        *,
        epsilon: float = NORM_EPSILON,
        norm: type[ScaleNorm] | type[LayerNorm] = ScaleNorm,
    ):
        """Without an `mlp` the block is the mixer alone. `epsilon` is that of the norms, and `norm` their class."""
        self.before_mixer, self.mixer = norm(dim, epsilon), mixer
        self.before_mlp, self.mlp = (None, None) if mlp is None else (norm(dim, epsilon), mlp)

    @property
    def rotary_dim(self) -> int | None:
        return self.mixer.rotary_dim

    def init_state(self, batch: int, window: int | None) -> PyTree[Array]:
        return self.mixer.init_state(batch, window)

    @eqx.filter_jit
    def __call__(
        self, x: Float[Array, "batch length dim"], context: BlockContext, state: PyTree[Array] = None
    ) -> LayerOutput:
        x, inputs = self.before_mixer.beside(x, context.implementation, context.compute)
        mixed = self.mixer(inputs, context, state)
        x = x + mixed.hidden.astype(x.dtype)
        if self.mlp is None or self.before_mlp is None:
            return LayerOutput(x, mixed.update)
        x, inputs = self.before_mlp.beside(x, context.implementation, context.compute)
        if isinstance(self.mlp, Experts):
            chosen = self.mlp(inputs, context.layout.mask, training=context.training)
            return LayerOutput(x + chosen.hidden.astype(x.dtype), mixed.update, chosen.loss)
        hidden = self.mlp(inputs, context.implementation) if isinstance(self.mlp, SwiGLU) else self.mlp(inputs)
        return LayerOutput(x + hidden.astype(x.dtype), mixed.update)


class Attending(AbstractBlock):
    r"""Every position attends to the vectors of its token, then passes through another block (BLT's decoder).

    $x_i \leftarrow \mathrm{block}(\mathrm{CrossLayer}(x_i, \{u_{m,1} \dots u_{m,k}\}))$, with u the vectors into which
    `Stack.unfold` maps the output of token $m = \mathrm{token\_of}(i)$. Keys and values are computed once for each token.
    """

    cross: CrossLayer
    block: AbstractBlock

    @property
    def rotary_dim(self) -> int | None:
        return self.block.rotary_dim

    def init_state(self, batch: int, window: int | None) -> PyTree[Array]:
        return self.block.init_state(batch, window)

    @eqx.filter_jit
    def __call__(
        self, x: Float[Array, "batch length dim"], context: BlockContext, state: PyTree[Array] = None
    ) -> LayerOutput:
        assert context.tokens is not None
        tokens, dim, width = context.tokens, x.shape[-1], self.cross.key_value.weight.shape[1]
        batch, count = tokens.outputs.shape[:2]
        # (b, tokens, vectors, dim), then (b, tokens, vectors * width), then (b, length, vectors, width)
        vectors = tokens.outputs.reshape(batch, count, -1, dim)
        keys_values = self.cross.keys_values(vectors).reshape(batch, count, -1)
        keys_values = tokens.spread(keys_values).reshape(*x.shape[:2], -1, width)
        return self.block(self.cross.attend_vectors(x, keys_values, context.compute), context, state)


class DividedBlock(AbstractBlock):
    """A block whose parameters lie in parts on several devices. They are put together where the block runs, and again in its
    backward pass, so that no more than a block's are whole at a time; the devices along `TENSOR` then share its layers.

    `divisions`: that of each leaf of the block's parameters, in order.
    """

    block: AbstractBlock
    divisions: tuple[Division, ...] = eqx.field(static=True)

    @property
    def rotary_dim(self) -> int | None:
        # Blocks derive it from the shapes of their parameters, of which these are parts.
        return eqx.filter_eval_shape(gathered, self.block, self.divisions).rotary_dim

    def init_state(self, batch: int, window: int | None) -> PyTree[Array]:
        return self.block.init_state(batch, window)

    def __call__(
        self, x: Float[Array, "batch length dim"], context: BlockContext, state: PyTree[Array] = None
    ) -> LayerOutput:
        return shared(gathered(self.block, self.divisions))(x, context, state)


class Stack(eqx.Module):
    """Blocks one after another, all with the same attention window.

    With a final `norm` the residual stream is float32 for inputs of any dtype, and the output has the input's dtype (H-Net).
    `remat` stores only the input of each block for the backward pass and recomputes the rest. `unfold`, if there is one, maps
    each token's output to the vectors that `Attending` blocks see, concatenated (BLT).
    """

    blocks: tuple[AbstractBlock, ...]
    window: int | None = eqx.field(static=True)
    remat: bool = eqx.field(static=True)
    norm: ScaleNorm | LayerNorm | None = None
    unfold: Linear | None = None
    rotary_base: float = eqx.field(static=True, default=ROTARY_BASE)
    attention: AttentionForm = eqx.field(static=True, default="auto")
    rotary_scaling: RotaryScaling | None = eqx.field(static=True, default=None)
    implementation: Implementation | None = eqx.field(static=True, default=None)

    def __init__(
        self,
        blocks: Sequence[AbstractBlock],
        *,
        window: int | None = None,
        remat: bool = False,
        norm: ScaleNorm | LayerNorm | None = None,
        unfold: Linear | None = None,
        rotary_base: float = ROTARY_BASE,
        attention: AttentionForm = "auto",
        rotary_scaling: RotaryScaling | None = None,
        implementation: Implementation | None = None,
    ):
        """`window`: how many positions attention sees, its own included; None for all before it. `rotary_base` and
        `rotary_scaling`: see `Rotary`. `attention`: its form, see `AttentionForm`. `implementation`: that of norms and gates.
        Raises `ValueError` for a window below 1, for blocks with different `rotary_dim`, and for `Attending` blocks without
        `unfold`."""
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, the position itself; got {window}")
        rotary_dims = {block.rotary_dim for block in blocks} - {None}
        if len(rotary_dims) > 1:
            raise ValueError(f"the blocks of a stack must share one rotary_dim; got {sorted(map(str, rotary_dims))}")
        if unfold is None and any(isinstance(block, Attending) for block in blocks):
            raise ValueError("blocks that attend to tokens need the vectors that `unfold` makes of them")
        self.blocks = tuple(blocks)
        self.window, self.remat, self.norm, self.unfold = window, remat, norm, unfold
        self.rotary_base, self.attention, self.rotary_scaling = rotary_base, attention, rotary_scaling
        self.implementation = implementation

    def computed(
        self, *, remat: bool, attention: AttentionForm | None = None, implementation: Implementation | None = None
    ) -> Stack:
        """The same stack with or without recomputation in the backward pass, and with another form of attention and another
        implementation of norms and gates if they are given."""
        attention = self.attention if attention is None else attention
        implementation = self.implementation if implementation is None else implementation
        return with_fields(self, remat=remat, attention=attention, implementation=implementation)

    def with_blocks(self, blocks: Sequence[AbstractBlock]) -> Stack:
        """The same stack with others in the place of its blocks."""
        return with_fields(self, blocks=tuple(blocks))

    def _in_training(self, block: AbstractBlock) -> Callable[..., LayerOutput]:
        """The block, with what is not stored for its backward pass computed again there."""
        if self.remat:
            return eqx.filter_checkpoint(block)
        if isinstance(block, DividedBlock):
            return eqx.filter_checkpoint(block, policy=keeps_activations)
        return block

    def init_state(self, batch: int) -> tuple[PyTree[Array], ...]:
        """The decode states of the blocks before the first position."""
        return tuple(block.init_state(batch, self.window) for block in self.blocks)

    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        layout: Layout,
        state: tuple[PyTree[Array], ...] | None = None,
        tokens: VisibleTokens | None = None,
        *,
        training: bool = False,
    ) -> LayerOutput:
        """The hidden states, the updates of the blocks' states, and in `training` the loss of mixtures of experts. `tokens`:
        those of the inner level, for a stack that attends to them. Raises `ValueError` if such a stack gets none."""
        context = self._context(x, layout, state, tokens, training)
        stream, updates, experts = x if self.norm is None else x.astype(jnp.float32), [], None
        for block, old in zip(self.blocks, (None,) * len(self.blocks) if state is None else state, strict=True):
            output = self._in_training(block)(stream, context, old)
            stream = output.hidden
            experts = experts if output.experts is None else output.experts.plus(experts)
            updates.append(output.update)
        hidden = stream if self.norm is None else self.norm(stream).astype(x.dtype)
        return LayerOutput(hidden, None if state is None else tuple(updates), experts)

    def _context(
        self,
        x: Float[Array, "batch length dim"],
        layout: Layout,
        state: tuple[PyTree[Array], ...] | None,
        tokens: VisibleTokens | None,
        training: bool,
    ) -> BlockContext:
        rotary = visibility = unfolded = None
        rotary_dim = next((block.rotary_dim for block in self.blocks if block.rotary_dim is not None), None)
        if rotary_dim is not None:
            rotary = Rotary(layout.positions, rotary_dim, self.rotary_base, self.rotary_scaling)
            # In decoding, positions also see the KV caches, which have their own mask.
            if state is None or is_unallocated(state):
                visibility = Visibility(layout, self.window, self.attention)
        if self.unfold is not None:
            if tokens is None:
                raise ValueError(
                    "the stack would attend to tokens, but there are none: it must be the decoder of a Hierarchy"
                )
            unfolded = tokens.replaced(self.unfold(tokens.outputs))
        return BlockContext(layout, rotary, visibility, unfolded, str(x.dtype), training, self.implementation)


def attending(
    stack: Stack,
    which: Attends,
    *,
    dim: int,
    heads: int,
    vectors: int,
    token_dim: int | None = None,
    kv_heads: int | None = None,
    epsilon: float = NORM_EPSILON,
    key: PRNGKeyArray,
) -> Stack:
    """The same stack, for positions of width `dim`, with its `first` block or `every` block attending to tokens of width
    `token_dim` (None: `dim`), each unfolded into `vectors` vectors. `kv_heads` and `epsilon`: see `CrossLayer`. Raises
    `ValueError` for a stack without blocks."""
    if which == "none":
        return stack
    if not stack.blocks:
        raise ValueError(f"the stack has no block that could attend to tokens ({which!r})")
    key_unfold, key_blocks = jax.random.split(key)
    unfold = Linear(dim if token_dim is None else token_dim, vectors * dim, key=key_unfold)
    changed = stack.blocks[:1] if which == "first" else stack.blocks
    keys = jax.random.split(key_blocks, len(changed))
    cross = [CrossLayer(dim, heads, kv_heads=kv_heads, epsilon=epsilon, key=one) for one in keys]
    new = [Attending(layer, block) for layer, block in zip(cross, changed, strict=True)]
    return Stack(
        [*new, *stack.blocks[len(new) :]],
        window=stack.window,
        remat=stack.remat,
        norm=stack.norm,
        unfold=unfold,
        rotary_base=stack.rotary_base,
        attention=stack.attention,
        rotary_scaling=stack.rotary_scaling,
        implementation=stack.implementation,
    )


def transformer(
    layers: int,
    dim: int,
    heads: int,
    mlp_dim: int,
    *,
    window: int | None,
    remat: bool = False,
    attention: AttentionForm = "auto",
    implementation: Implementation | None = None,
    key: PRNGKeyArray,
) -> Stack:
    """A stack of Gemma-2 blocks without a final norm."""
    keys = jax.random.split(key, layers) if layers else ()
    blocks = [Block(dim, heads, mlp_dim, key=k) for k in keys]
    return Stack(blocks, window=window, remat=remat, attention=attention, implementation=implementation)


Tree = TypeVar("Tree", bound=PyTree)


def computed(
    tree: Tree, *, remat: bool, attention: AttentionForm | None = None, implementation: Implementation | None = None
) -> Tree:
    """The same tree of modules with all its stacks `computed` in this way."""

    def changed(node: PyTree) -> PyTree:
        if not isinstance(node, Stack):
            return node
        return node.computed(remat=remat, attention=attention, implementation=implementation)

    return jax.tree.map(changed, tree, is_leaf=lambda node: isinstance(node, Stack))
