"""What training costs, by two rules of thumb: floating-point operations per byte of text."""

from __future__ import annotations

from dataclasses import dataclass

import equinox as eqx
import jax
from jaxtyping import PyTree

from estimators.base import Frozen
from unet.blocks import Stack
from unet.model import UNet
from unet.stage import Flat, Hierarchy


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


def matrix_flops(model: UNet, *, rate: float, samples: int = 1) -> Flops:
    """6 per parameter and byte, or token at the token level; embeddings are lookups (score-function paper, appendix D).

    `rate` is in tokens per byte. Every parameter of matrices and vectors counts but the embedding's; a frozen parameter
    counts 2, for the forward pass alone. With several `samples` of boundaries a byte passes all that follows the encoder
    so many times. Raises `ValueError` for a model of more than one level of tokens.
    """
    encode, mid, decode = _stacks(model)
    after = float(samples)
    estimators = model.stage.estimators
    trained, frozen = _sizes(estimators)
    return Flops(
        embed=0.0,
        encode=6.0 * _size(encode),
        boundary=6.0 * trained + 2.0 * frozen,
        mid=6.0 * after * rate * _size(mid),
        decode=6.0 * after * _size(decode),
        heads=6.0
        * after
        * (_size((model.norm, model.head)) + model.early_share * _size((model.early_norm, model.early_head))),
    )


def layer_flops(model: UNet, *, length: int, rate: float, samples: int = 1) -> Flops:
    """Every product of every layer, the backward pass twice the forward (H-Net, appendix B).

    Attention sees `length` rows at byte level, no more than its window; `length · rate` at token level, the causal half not
    taken off, as in the paper. Embeddings count as products with one-hot rows. Raises `ValueError` for a model of more
    than one level of tokens.
    """
    encode, mid, decode = _stacks(model)
    after = float(samples)
    vocab, dim = model.embedding.shape
    trained, frozen = _sizes(model.stage.estimators)
    heads = 1 + (0.0 if model.early_head is None else model.early_share)
    return Flops(
        embed=3 * 2.0 * vocab * dim,
        encode=3 * _stack_forward(encode, float(length)),
        boundary=3 * 2.0 * trained + 2.0 * frozen,
        mid=3 * after * rate * _stack_forward(mid, length * rate),
        decode=3 * after * _stack_forward(decode, float(length)),
        heads=3 * after * heads * 2.0 * vocab * dim,
    )


def _stack_forward(stack: Stack | None, rows: float) -> float:
    """Operations of a forward pass per row of a stack that runs on `rows` rows."""
    if stack is None:
        return 0.0
    seen = rows if stack.window is None else min(rows, stack.window)
    total = 0.0
    for block in stack.blocks:
        inner, dim = block.attention.out.weight.shape[1], block.attention.out.weight.shape[0]
        hidden = block.mlp.down.weight.shape[1]
        attention = 2 * 3 * dim * inner + 2 * 2 * seen * inner + 3 * block.attention.heads * seen + 2 * inner * dim
        total += attention + 2 * 3 * dim * hidden + 5 * dim
    return total


def _stacks(model: UNet) -> tuple[Stack, Stack | None, Stack | None]:
    """Encoder, token level and decoder."""
    stage = model.stage
    if isinstance(stage, Flat):
        return stage.stack, None, None
    if isinstance(stage, Hierarchy) and isinstance(stage.inner, Flat):
        return stage.encoder, stage.inner.stack, stage.decoder
    raise ValueError("operations are counted for models of at most one level of tokens")


def _size(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))


def _sizes(tree: PyTree) -> tuple[int, int]:
    """Parameters that train and parameters that are frozen."""
    parts = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Frozen))
    frozen = sum(_size(part) for part in parts if isinstance(part, Frozen))
    return _size(tree) - frozen, frozen
