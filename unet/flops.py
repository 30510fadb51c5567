"""Training cost in floating-point operations per byte of text, by two rules of thumb."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import equinox as eqx
import jax
from jaxtyping import PyTree

from estimators.base import AbstractEstimator, Frozen
from unet.attention import AbstractMixer, Attention
from unet.blocks import AbstractBlock, Attending, Block, PreNorm, Stack
from unet.experts import Experts
from unet.hierarchy import AbstractStage, Flat, Hierarchy
from unet.language_model import AbstractLanguageModel
from unet.layers import MLP, Affine, Linear
from unet.mamba import Mamba2
from unet.model import UNet
from unet.tokens.model import TokenModel
from unet.widened import Widened
from unet.wrapped import Adapted, Positioned


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a training step per byte, forward and backward, by part of the model.

    `embed`: the byte embedding, a lookup or a product depending on the rule; `encode`, `decode`: byte-level blocks; `boundary`:
    router, chunker and objective, including the forward pass of a frozen model if there is one; `mid`: token-level blocks;
    `heads`: output head and early-exit head.
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

    def times(self, factor: float) -> Flops:
        """Every part times a factor."""
        return Flops(*(factor * part for part in astuple(self)))


def matrix_flops(
    model: AbstractLanguageModel, *, rate: float, inner_rates: Sequence[float] = (), samples: int = 1
) -> Flops:
    """6 per parameter and byte (or token, at the token level); embeddings are lookups (score-function paper, appendix D).

    `rate` is in tokens per byte, each of `inner_rates` in tokens per token of the level around. All parameters count except the
    embedding, which counts only if it is tied; a frozen parameter counts 2, for the forward pass alone. With several `samples`
    of boundaries, everything after the encoder but the early-exit head runs that many times. `mid` includes everything inside
    the token level, further levels too. In a model of tokens everything, the head of its vocabulary too, runs at `rate` tokens
    per byte, and its own levels have the `inner_rates`. Raises `ValueError` if rates of levels are missing.
    """
    if isinstance(model, TokenModel):
        own = _own_rates(model, inner_rates)
        return matrix_flops(model.unet, rate=own[0], inner_rates=own[1:], samples=samples).times(rate)
    model = model.unet

    def stage_cost(stage: AbstractStage, rates: Sequence[float]) -> float:
        """Operations of a stage inside a token level, for each of its positions."""
        if isinstance(stage, Widened):
            return 6.0 * stage.padding.size + stage_cost(stage.stage, rates)
        if isinstance(stage, Adapted):
            return 6.0 * _size((stage.enter, stage.leave)) + stage_cost(stage.stage, rates)
        if isinstance(stage, Positioned):
            return stage_cost(stage.stage, rates)
        if isinstance(stage, Flat):
            return 6.0 * _stack_size(stage.stack, 0.0)
        if isinstance(stage, Hierarchy):
            trained, frozen = _sizes(stage.estimator)
            outside = 6.0 * (_size(stage.encoder) + _stack_size(stage.decoder, rates[0])) + 6.0 * trained + 2.0 * frozen
            return outside + rates[0] * stage_cost(stage.inner, rates[1:])
        raise ValueError(f"the operations of a {type(stage).__name__} cannot be counted")

    outer = _outermost(model, inner_rates)
    trained, frozen = (0, 0) if outer.estimator is None else _sizes(outer.estimator)
    return Flops(
        embed=0.0,
        encode=6.0 * _stack_size(outer.encoder, 0.0),
        boundary=6.0 * trained + 2.0 * frozen,
        mid=0.0 if outer.inner is None else samples * rate * stage_cost(outer.inner, inner_rates),
        decode=6.0 * samples * _stack_size(outer.decoder, rate),
        heads=6.0 * samples * _size((model.norm, model.output_head))
        + 6.0 * model.early_exit_fraction * _size((model.early_norm, model.early_head)),
    )


def layer_flops(
    model: AbstractLanguageModel, *, length: int, rate: float, inner_rates: Sequence[float] = (), samples: int = 1
) -> Flops:
    """Every product of every layer, the backward pass counted as twice the forward (H-Net, appendix B).

    Self-attention sees `length` positions at byte level, at most its window, and `length · rate` at token level; the masked
    half is not deducted, as in the paper. Cross-attention sees the vectors of one token. Embeddings count as products with
    one-hot vectors. Everything else is as in `matrix_flops`; a model of tokens sees `length · rate` of them.
    """
    if isinstance(model, TokenModel):
        own, tokens = _own_rates(model, inner_rates), round(length * rate)
        return layer_flops(model.unet, length=tokens, rate=own[0], inner_rates=own[1:], samples=samples).times(rate)
    model = model.unet

    def stage_cost(stage: AbstractStage, positions: float, rates: Sequence[float]) -> float:
        if isinstance(stage, Widened | Positioned):
            return stage_cost(stage.stage, positions, rates)
        if isinstance(stage, Adapted):
            own = 3 * 2.0 * _size((stage.enter, stage.leave))
            return own + stage_cost(stage.stage, positions, rates)
        if isinstance(stage, Flat):
            return 3 * _stack_forward(stage.stack, positions)
        if isinstance(stage, Hierarchy):
            trained, frozen = _sizes(stage.estimator)
            outside = 3 * (
                _stack_forward(stage.encoder, positions) + _stack_forward(stage.decoder, positions, rates[0])
            )
            inside = rates[0] * stage_cost(stage.inner, positions * rates[0], rates[1:])
            return outside + 3 * 2.0 * trained + 2.0 * frozen + inside
        raise ValueError(f"the operations of a {type(stage).__name__} cannot be counted")

    outer = _outermost(model, inner_rates)
    vocab, dim = model.embedding.shape
    trained, frozen = (0, 0) if outer.estimator is None else _sizes(outer.estimator)
    heads = samples + (0.0 if model.early_head is None else model.early_exit_fraction)
    return Flops(
        embed=3 * 2.0 * vocab * dim,
        encode=3 * _stack_forward(outer.encoder, float(length)),
        boundary=3 * 2.0 * trained + 2.0 * frozen,
        mid=0.0 if outer.inner is None else samples * rate * stage_cost(outer.inner, length * rate, inner_rates),
        decode=3 * samples * _stack_forward(outer.decoder, float(length), rate),
        heads=3 * heads * 2.0 * vocab * dim,
    )


def _stack_size(stack: Stack | None, rate: float) -> float:
    """Parameters of a stack; those applied to tokens (their unfolding, keys and values) are weighted by `rate`, those of experts
    by the share of them that a position chooses."""
    if stack is None:
        return 0.0
    attending = [block.cross for block in stack.blocks if isinstance(block, Attending)]
    of_tokens = _size((stack.unfold, [(cross.before_key_value, cross.key_value) for cross in attending]))
    mixtures = [block.mlp for block in stack.blocks if isinstance(block, PreNorm) and isinstance(block.mlp, Experts)]
    idle = sum((1 - mlp.choices / mlp.experts) * (mlp.value_gate.size + mlp.out.size) for mlp in mixtures)
    return _size(stack) - (1 - rate) * of_tokens - idle


def _stack_forward(stack: Stack | None, positions: float, rate: float = 0.0) -> float:
    """Operations of a forward pass for each position of a stack over `positions` positions, of which a fraction `rate` close a
    token that the stack attends to."""
    if stack is None:
        return 0.0
    seen = positions if stack.window is None else min(positions, float(stack.window))
    total = sum(_block_forward(block, seen) for block in stack.blocks)
    if stack.unfold is None:
        return total
    unfolded = stack.unfold.weight.shape[1]
    total += rate * 2.0 * stack.unfold.weight.size
    for block in stack.blocks:
        if isinstance(block, Attending):
            dim = block.cross.out.weight.shape[1]
            vectors = unfolded / dim
            per_token = 2.0 * vectors * block.cross.key_value.weight.size
            total += 2.0 * 2 * dim * dim + 2 * 2 * vectors * dim + 3 * block.cross.heads * vectors + rate * per_token
    return total


def _block_forward(block: AbstractBlock, seen: float) -> float:
    if isinstance(block, Block):
        return _mixer_forward(block.attention, seen) + _mlp_forward(block.mlp.down)
    if isinstance(block, Attending):
        return _block_forward(block.block, seen)
    if isinstance(block, PreNorm):
        mixed = _mixer_forward(block.mixer, seen)
        if isinstance(block.mlp, Experts):
            one = 2.0 * 3 * block.mlp.out.size / block.mlp.experts + 5 * block.mlp.out.shape[2]
            return mixed + block.mlp.choices * one + 2 * block.mlp.router.weight.size
        if isinstance(block.mlp, MLP):
            return mixed + _mlp_forward(block.mlp.out, matrices=2)
        return mixed + (0.0 if block.mlp is None else _mlp_forward(block.mlp.out))
    raise ValueError(f"the operations of a {type(block).__name__} cannot be counted")


def _mixer_forward(mixer: AbstractMixer, seen: float) -> float:
    if isinstance(mixer, Attention):
        inner, dim = mixer.out.weight.shape
        return 2.0 * mixer.qkv.weight.size + 2 * 2 * seen * inner + 3 * mixer.heads * seen + 2 * inner * dim
    if isinstance(mixer, Mamba2):
        inner, dim = mixer.project_out.weight.shape
        channels, conv_width = mixer.conv_weight.shape
        state = (channels - inner) // 2
        # The paper counts the output projection and the convolution with the width of the stage; these are the actual widths.
        projections = 2.0 * mixer.project_in.weight.size + 2 * inner * dim
        return projections + 2 * 3 * inner * state + 2 * channels * conv_width + 5 * dim
    raise ValueError(f"the operations of a {type(mixer).__name__} cannot be counted")


def _mlp_forward(out: Linear | Affine, matrices: int = 3) -> float:
    hidden, dim = out.weight.shape
    return 2.0 * matrices * dim * hidden + 5 * dim


@dataclass(frozen=True)
class _Outermost:
    """The byte level: its stacks, and what is inside (None without a token level)."""

    encoder: Stack
    estimator: AbstractEstimator | None = None
    inner: AbstractStage | None = None
    decoder: Stack | None = None


def _own_rates(model: TokenModel, inner_rates: Sequence[float]) -> Sequence[float]:
    """The rates of the levels inside the tokenizer, which are all that its `UNet` has; 0 without any."""
    if len(inner_rates) < len(model.estimators):
        raise ValueError(
            f"{len(model.estimators)} levels inside the tokenizer need as many inner_rates; got {list(inner_rates)}"
        )
    return inner_rates or (0.0,)


def _outermost(model: UNet, inner_rates: Sequence[float]) -> _Outermost:
    stage = model.stage.stage if isinstance(model.stage, Positioned) else model.stage
    inside = len(stage.estimators) - 1
    if len(inner_rates) < inside:
        raise ValueError(f"{inside} inner levels need as many inner_rates; got {list(inner_rates)}")
    if isinstance(stage, Flat):
        return _Outermost(stage.stack)
    if isinstance(stage, Hierarchy):
        return _Outermost(stage.encoder, stage.estimator, stage.inner, stage.decoder)
    raise ValueError(f"the operations of a {type(stage).__name__} cannot be counted")


def _size(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))


def _sizes(tree: PyTree) -> tuple[int, int]:
    """Number of trained and of frozen parameters."""
    parts = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Frozen))
    frozen = sum(_size(part) for part in parts if isinstance(part, Frozen))
    return _size(tree) - frozen, frozen
