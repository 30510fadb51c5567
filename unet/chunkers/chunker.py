"""A chunker is a downsampler, which makes tokens of positions, and an upsampler, which brings token outputs back to positions."""

from __future__ import annotations

from abc import abstractmethod

import equinox as eqx
from jaxtyping import Array, Bool, Float, PyTree

from estimators.base import AbstractChunker, Boundaries, ChunkerState, Downsampled, Tokens, Upsampled

Hidden = Float[Array, "batch length dim"]
"""The hidden states of the positions."""

Outputs = Float[Array, "batch tokens token_dim"]
"""The token level's outputs, or values made of them."""

Mask = Bool[Array, "batch length"]
"""One truth value for each position."""

Vector = Float[Array, "batch 1 token_dim"]
"""One vector for each sequence: what an upsampler keeps of the last token."""


class AbstractDownsampler(eqx.Module):
    """Makes a token of the positions that a boundary closes."""

    @property
    def passes_gradient_to(self) -> frozenset[str]:
        """See `AbstractChunker.passes_gradient_to`."""
        return frozenset()

    def token_dim(self, dim: int) -> int:
        """The width of tokens made of positions of width `dim`."""
        return dim

    @abstractmethod
    def init_state(self, batch: int, dim: int) -> PyTree[Array]:
        """The decode state before the first position: what is kept of the group that no boundary has closed yet."""

    @abstractmethod
    def __call__(
        self, hidden: Hidden, boundaries: Boundaries, *, capacity: int, mask: Mask | None = None, state: PyTree = None
    ) -> Downsampled:
        """See `AbstractChunker.down`."""


class AbstractUpsampler(eqx.Module):
    """Brings the token level's outputs back to the positions."""

    @property
    def passes_gradient_to(self) -> frozenset[str]:
        """See `AbstractChunker.passes_gradient_to`."""
        return frozenset()

    @property
    def widens(self) -> bool:
        """Whether token outputs may be wider than positions."""
        return False

    @abstractmethod
    def init_state(self, batch: int, dim: int) -> PyTree[Array]:
        """The decode state before the first position: what is kept of the last token."""

    @abstractmethod
    def __call__(
        self, outputs: Outputs, tokens: Tokens, hidden: Hidden, boundaries: Boundaries, *, state: PyTree = None
    ) -> Upsampled:
        """See `AbstractChunker.up`."""


class Chunker(AbstractChunker):
    """Any downsampler with any upsampler.

    SFE (eq. 7-8): `Chunker(Select(), Distribute())`. DPT: `Chunker(MeanPool(dim, key=key), Distribute())`. H-Net (eq. 5-9):
    `Chunker(Select(), Smooth())`. BLT: `Chunker(AttentionPool(dim, heads, key=key), LeaveToDecoder())`.
    """

    downsampler: AbstractDownsampler
    upsampler: AbstractUpsampler

    @property
    def passes_gradient_to(self) -> frozenset[str]:
        return self.downsampler.passes_gradient_to | self.upsampler.passes_gradient_to

    def token_dim(self, dim: int) -> int:
        return self.downsampler.token_dim(dim)

    def init_state(self, batch: int, dim: int) -> ChunkerState:
        return ChunkerState(self.downsampler.init_state(batch, dim), self.upsampler.init_state(batch, dim))

    def down(
        self, hidden: Hidden, boundaries: Boundaries, *, capacity: int, mask: Mask | None = None, state: PyTree = None
    ) -> Downsampled:
        if state is not None and mask is None:
            raise ValueError("a chunker with a decode state needs the mask of the positions that are there")
        return self.downsampler(hidden, boundaries, capacity=capacity, mask=mask, state=state)

    def up(
        self, outputs: Outputs, tokens: Tokens, hidden: Hidden, boundaries: Boundaries, *, state: PyTree = None
    ) -> Upsampled:
        """Raises `ValueError` if tokens are wider than positions and the upsampler cannot take them."""
        if outputs.shape[-1] != hidden.shape[-1] and not self.upsampler.widens:
            raise ValueError(
                f"{type(self.upsampler).__name__} needs tokens as wide as positions; tokens of width "
                f"{outputs.shape[-1]} at positions of width {hidden.shape[-1]} need LeaveToDecoder"
            )
        return self.upsampler(outputs, tokens, hidden, boundaries, state=state)
