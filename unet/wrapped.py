"""Stages around a stage: of another width, or with learned positions."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from estimators.base import AbstractEstimator, Layout
from unet.hierarchy import AbstractStage, Encoded, StageOutput, StageSampling
from unet.layers import Linear, ScaleNorm, SwiGLU


class AbstractWrapped(AbstractStage):
    """A stage around another `stage`, with its boundaries: what changes are the hidden states on the way in and out."""

    stage: eqx.AbstractVar[AbstractStage]

    @abstractmethod
    def inner_dim(self, dim: int) -> int:
        """The width of the stage inside, for hidden states of width `dim`."""

    @abstractmethod
    def inwards(self, hidden: Float[Array, "batch length dim"], layout: Layout) -> Float[Array, "batch length inner"]:
        """The hidden states of the stage inside."""

    @abstractmethod
    def outwards(self, hidden: Float[Array, "batch length inner"]) -> Float[Array, "batch length dim"]:
        """The output, from that of the stage inside."""

    @property
    def estimators(self) -> tuple[AbstractEstimator, ...]:
        return self.stage.estimators

    def init_state(self, batch: int, dim: int) -> PyTree[Array]:
        return self.stage.init_state(batch, self.inner_dim(dim))

    def encode(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        sampling: StageSampling,
        state: PyTree[Array] = None,
    ) -> Encoded:
        return self.stage.encode(self.inwards(hidden, layout), layout, sampling, state)

    def decode(
        self, encoded: Encoded, sampling: StageSampling, state: PyTree[Array] = None, *, capacity: int | None = None
    ) -> StageOutput:
        output = self.stage.decode(encoded, sampling, state, capacity=capacity)
        return dataclasses.replace(output, hidden=self.outwards(output.hidden))


class Positioned(AbstractWrapped):
    """A stage whose positions have learned embeddings, which are added on the way in: `table[p]` at position p of its document
    (GPT-2).

    Positions beyond the last row of the table have that row. A model of tokens refuses such texts (`UNet.require_positions`); in
    a hierarchy that was made of one, how many positions there are depends on the boundaries.
    """

    table: Float[Array, "positions dim"]
    stage: AbstractStage

    def __init__(self, table: Float[Array, "positions dim"], stage: AbstractStage):
        self.table, self.stage = table, stage

    def inner_dim(self, dim: int) -> int:
        return dim

    def inwards(self, hidden: Float[Array, "batch length dim"], layout: Layout) -> Float[Array, "batch length dim"]:
        places = jnp.where(layout.mask, layout.document_positions, 0)
        return hidden + jnp.take(self.table, places, axis=0, mode="clip").astype(hidden.dtype)

    def outwards(self, hidden: Float[Array, "batch length dim"]) -> Float[Array, "batch length dim"]:
        return hidden


class Adapter(eqx.Module):
    r"""From one width to another: $y = N(x) W + \mathrm{mlp}(N(x))$ with a gated MLP (H-Net appendix F, which has the MLP alone).

    W starts as the identity, or at another width as a draw from a normal of standard deviation `dim**-0.5`, and the MLP with
    outputs of zero.
    """

    norm: ScaleNorm
    direct: Linear
    mlp: SwiGLU

    def __init__(self, dim: int, hidden: int, outputs: int, *, key: PRNGKeyArray):
        """`hidden`: the inner width of the MLP."""
        key_direct, key_mlp = jax.random.split(key)
        self.norm, self.mlp = ScaleNorm(dim), SwiGLU(dim, hidden, outputs=outputs, key=key_mlp)
        self.mlp = eqx.tree_at(lambda mlp: mlp.out.weight, self.mlp, replace_fn=jnp.zeros_like)
        same = Linear.of(jnp.eye(dim, dtype=jnp.float32))
        self.direct = same if dim == outputs else Linear(dim, outputs, key=key_direct)

    def __call__(self, x: Float[Array, "*shape dim"]) -> Float[Array, "*shape outputs"]:
        normed = self.norm(x)
        return self.direct(normed) + self.mlp(normed)


class Adapted(AbstractWrapped):
    """A stage of another width, or of another origin, between two adapters (H-Net appendix F)."""

    enter: Adapter
    stage: AbstractStage
    leave: Adapter

    def __init__(self, dim: int, stage: AbstractStage, token_dim: int, hidden: int, *, key: PRNGKeyArray):
        """A `stage` of width `token_dim` for positions of width `dim`; `hidden`: the inner width of the adapters."""
        key_enter, key_leave = jax.random.split(key)
        self.enter = Adapter(dim, hidden, token_dim, key=key_enter)
        self.leave = Adapter(token_dim, hidden, dim, key=key_leave)
        self.stage = stage

    @property
    def token_dim(self) -> int:
        """The width of the stage inside."""
        return self.leave.norm.weight.shape[0]

    def inner_dim(self, dim: int) -> int:
        return self.token_dim

    def inwards(self, hidden: Float[Array, "batch length dim"], layout: Layout) -> Float[Array, "batch length inner"]:
        return self.enter(hidden)

    def outwards(self, hidden: Float[Array, "batch length inner"]) -> Float[Array, "batch length dim"]:
        return self.leave(hidden)
