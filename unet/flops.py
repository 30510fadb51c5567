"""What training costs, by two rules of thumb: floating-point operations per byte of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import equinox as eqx
import jax
from jaxtyping import PyTree

from estimators.base import AbstractEstimator, Frozen
from unet.attention import AbstractMixer, Attention
from unet.blocks import AbstractBlock, Attending, Block, PreNorm, Stack
from unet.layers import Linear
from unet.mamba import Mamba2
from unet.model import UNet
from unet.stage import AbstractStage, Flat, Hierarchy
from unet.widened import Widened


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a training step per byte, forward and backward, by part of the model.

    `embed`: the byte embedding, a lookup or a product depending on the rule; `encode`, `decode`: byte-level blocks;
    `boundary`: router, chunker and objective, with a frozen model's forward pass where there is one; `mid`: token-level
    blocks; `heads`: output head and early head.
    """

    embed: float
    encode: float
    boundary: float
    mid: float
    decode: float
    heads: float

    @property
    def total(self) -> float:
        """All parts together."""
        return self.embed + self.encode + self.boundary + self.mid + self.decode + self.heads


def matrix_flops(model: UNet, *, rate: float, inner_rates: Sequence[float] = (), samples: int = 1) -> Flops:
    """6 per parameter and byte, or token at the token level; embeddings are lookups (score-function paper, appendix D).

    `rate` is in tokens per byte, each of `inner_rates` in tokens per token of the level around. Every parameter of matrices
    and vectors counts but the embedding's, unless it is the head too; a frozen parameter counts 2, for the forward pass alone.
    With several `samples` of boundaries a byte passes all that follows the encoder so many times. What a token level does
    counts as `mid`, whatever levels there are inside. Raises `ValueError` where rates of levels are missing.
    """

    def stage_cost(stage: AbstractStage, rates: Sequence[float]) -> float:
        """Of all that runs inside a token level, per row of it."""
        if isinstance(stage, Widened):
            return 6.0 * stage.padding.size + stage_cost(stage.stage, rates)
        if isinstance(stage, Flat):
            return 6.0 * _size(stage.stack)
        if isinstance(stage, Hierarchy):
            trained, frozen = _sizes(stage.estimator)
            outside = 6.0 * (_size(stage.encoder) + _stack_size(stage.decoder, rates[0])) + 6.0 * trained + 2.0 * frozen
            return outside + rates[0] * stage_cost(stage.inner, rates[1:])
        raise ValueError(f"operations of a {type(stage).__name__} are not counted")

    outer, after = _outermost(model, inner_rates), float(samples)
    trained, frozen = (0, 0) if outer.estimator is None else _sizes(outer.estimator)
    return Flops(
        embed=0.0,
        encode=6.0 * _size(outer.encoder),
        boundary=6.0 * trained + 2.0 * frozen,
        mid=0.0 if outer.inner is None else after * rate * stage_cost(outer.inner, inner_rates),
        decode=6.0 * after * _stack_size(outer.decoder, rate),
        heads=6.0
        * after
        * (_size((model.norm, model.output_head)) + model.early_share * _size((model.early_norm, model.early_head))),
    )


def layer_flops(model: UNet, *, length: int, rate: float, inner_rates: Sequence[float] = (), samples: int = 1) -> Flops:
    """Every product of every layer, the backward pass twice the forward (H-Net, appendix B).

    Attention sees `length` rows at byte level, no more than its window, and of tokens the vectors of one; `length · rate` at
    token level, the causal half not taken off, as in the paper. Embeddings count as products with one-hot rows. The rest as
    `matrix_flops`.
    """

    def stage_cost(stage: AbstractStage, rows: float, rates: Sequence[float]) -> float:
        if isinstance(stage, Widened):
            return stage_cost(stage.stage, rows, rates)
        if isinstance(stage, Flat):
            return 3 * _stack_forward(stage.stack, rows)
        if isinstance(stage, Hierarchy):
            trained, frozen = _sizes(stage.estimator)
            outside = 3 * (_stack_forward(stage.encoder, rows) + _stack_forward(stage.decoder, rows, rates[0]))
            inside = rates[0] * stage_cost(stage.inner, rows * rates[0], rates[1:])
            return outside + 3 * 2.0 * trained + 2.0 * frozen + inside
        raise ValueError(f"operations of a {type(stage).__name__} are not counted")

    outer, after = _outermost(model, inner_rates), float(samples)
    vocab, dim = model.embedding.shape
    trained, frozen = (0, 0) if outer.estimator is None else _sizes(outer.estimator)
    heads = 1 + (0.0 if model.early_head is None else model.early_share)
    return Flops(
        embed=3 * 2.0 * vocab * dim,
        encode=3 * _stack_forward(outer.encoder, float(length)),
        boundary=3 * 2.0 * trained + 2.0 * frozen,
        mid=0.0 if outer.inner is None else after * rate * stage_cost(outer.inner, length * rate, inner_rates),
        decode=3 * after * _stack_forward(outer.decoder, float(length), rate),
        heads=3 * after * heads * 2.0 * vocab * dim,
    )


def _stack_size(stack: Stack | None, rate: float) -> float:
    """Parameters of a stack, those that make keys and values of tokens by the `rate` of these."""
    if stack is None:
        return 0.0
    attending = [block.cross for block in stack.blocks if isinstance(block, Attending)]
    of_tokens = _size((stack.unfold, [(cross.before_rows, cross.key_value) for cross in attending]))
    return _size(stack) - (1 - rate) * of_tokens


def _stack_forward(stack: Stack | None, rows: float, rate: float = 0.0) -> float:
    """Operations of a forward pass per row of a stack that runs on `rows` rows, where `rate` of them close a token that it looks
    at."""
    if stack is None:
        return 0.0
    seen = rows if stack.window is None else min(rows, float(stack.window))
    total = sum(_block_forward(block, seen) for block in stack.blocks)
    if stack.unfold is None:
        return total
    wide = stack.unfold.weight.shape[1]
    total += rate * 2.0 * stack.unfold.weight.size
    for block in stack.blocks:
        if isinstance(block, Attending):
            dim = block.cross.out.weight.shape[1]
            vectors = wide / dim
            per_token = 2.0 * vectors * block.cross.key_value.weight.size
            total += 2.0 * 2 * dim * dim + 2 * 2 * vectors * dim + 3 * block.cross.heads * vectors + rate * per_token
    return total


def _block_forward(block: AbstractBlock, seen: float) -> float:
    if isinstance(block, Block):
        return _mixer_forward(block.attention, seen) + _mlp_forward(block.mlp.down)
    if isinstance(block, Attending):
        return _block_forward(block.block, seen)
    if isinstance(block, PreNorm):
        return _mixer_forward(block.mixer, seen) + (0.0 if block.mlp is None else _mlp_forward(block.mlp.out))
    raise ValueError(f"operations of a {type(block).__name__} are not counted")


def _mixer_forward(mixer: AbstractMixer, seen: float) -> float:
    if isinstance(mixer, Attention):
        inner, dim = mixer.out.weight.shape
        return 2.0 * 3 * dim * inner + 2 * 2 * seen * inner + 3 * mixer.heads * seen + 2 * inner * dim
    if isinstance(mixer, Mamba2):
        inner, dim = mixer.project_out.weight.shape
        channels, taps = mixer.conv_weight.shape
        state = (channels - inner) // 2
        # The paper counts the last projection and the convolution as if they were as narrow as the stage.
        projections = 2.0 * mixer.project_in.weight.size + 2 * inner * dim
        return projections + 2 * 3 * inner * state + 2 * channels * taps + 5 * dim
    raise ValueError(f"operations of a {type(mixer).__name__} are not counted")


def _mlp_forward(out: Linear) -> float:
    hidden, dim = out.weight.shape
    return 2.0 * 3 * dim * hidden + 5 * dim


@dataclass(frozen=True)
class _Outermost:
    """The byte level: its stacks, and what is inside (None each where there is no token level)."""

    encoder: Stack
    estimator: AbstractEstimator | None = None
    inner: AbstractStage | None = None
    decoder: Stack | None = None


def _outermost(model: UNet, inner_rates: Sequence[float]) -> _Outermost:
    stage = model.stage
    inside = len(stage.estimators) - 1
    if len(inner_rates) < inside:
        raise ValueError(f"{inside} inner levels need as many rates; got {list(inner_rates)}")
    if isinstance(stage, Flat):
        return _Outermost(stage.stack)
    if isinstance(stage, Hierarchy):
        return _Outermost(stage.encoder, stage.estimator, stage.inner, stage.decoder)
    raise ValueError(f"operations of a {type(stage).__name__} are not counted")


def _size(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))


def _sizes(tree: PyTree) -> tuple[int, int]:
    """Parameters that train and parameters that are frozen."""
    parts = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Frozen))
    frozen = sum(_size(part) for part in parts if isinstance(part, Frozen))
    return _size(tree) - frozen, frozen
