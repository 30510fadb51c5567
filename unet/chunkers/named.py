"""Chunkers and pools by name, and how a chunker is built from them."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxtyping import PRNGKeyArray

from estimators.base import AbstractChunker
from estimators.keys import named_key
from estimators.lookup import Kind, Part, construct, is_configuration
from unet.chunkers.chunker import AbstractDownsampler, AbstractUpsampler, Chunker
from unet.chunkers.down import AttentionPool, AveragePool, MaxPool, MeanPool, Select, WithBoundary
from unet.chunkers.up import Deviation, Distribute, Insert, LeaveToDecoder, Projection, Smooth
from unet.ops import Implementation


@dataclass(frozen=True)
class ChunkerContext:
    """What a chunker is built from: the width of the positions, its downsampler, a key, the implementation of ops, and whether
    the estimator learns through the chunker."""

    dim: int
    pool: AbstractDownsampler
    key: PRNGKeyArray
    implementation: Implementation | None = None
    trains_router: bool = False


@dataclass(frozen=True)
class ChunkerConfig(ABC):
    """The settings of a chunker, each a flag, and how it is built."""

    @abstractmethod
    def build(self, context: ChunkerContext) -> AbstractChunker:
        """The chunker."""


@dataclass(frozen=True)
class SmoothConfig(ChunkerConfig):
    """Smoothing of tokens on their way back (H-Net)."""

    smoothing: bool = True
    """Average tokens with the probabilities of their boundaries (H-Net eq. 5)."""
    weighting: Literal["straight-through", "confidence", "none"] | None = None
    """Weight of a token by the router's confidence (H-Net eq. 6-9); by default straight-through for an estimator that learns
    through the chunker, none otherwise."""
    residual: Literal["plain", "projected"] = "plain"
    """What the bytes keep of the encoder: its states, or a projection of them that starts at zero (H-Net eq. 3)."""

    def build(self, context: ChunkerContext) -> AbstractChunker:
        published = "straight-through" if context.trains_router else "none"
        weighting = published if self.weighting is None else self.weighting
        projection = Projection(context.dim, key=context.key) if self.residual == "projected" else None
        return Chunker(context.pool, Smooth(projection, self.smoothing, weighting, context.implementation))


CHUNKERS = Kind(
    "--chunker",
    "caesura.chunkers",
    {
        "distribute": Distribute,
        "deviate": Deviation,
        "insert": Insert,
        "smooth": SmoothConfig,
        "attend": LeaveToDecoder,
    },
    (ChunkerConfig, AbstractChunker, AbstractUpsampler),
    frozenset({"dim", "key", "pool", "implementation"}),
)
"""Ways back from tokens to positions, and whole chunkers, by name."""

POOLS = Kind(
    "--pool",
    "caesura.pools",
    {"last": Select, "max": MaxPool, "average": AveragePool, "mean": MeanPool, "attention": AttentionPool},
    (AbstractDownsampler,),
    frozenset({"dim", "key", "implementation"}),
)
"""Ways from positions to tokens, by name."""


@dataclass(frozen=True)
class ChunkerNames:
    """Which chunker to build: its `chunker` and `pool`, the settings of their constructors by section, and whether the position
    at the boundary is added to the pooled value."""

    chunker: Part
    pool: Part
    sections: Mapping[str, object]
    boundary: bool = False

    def build(
        self, dim: int, key: PRNGKeyArray, implementation: Implementation | None, *, trains_router: bool
    ) -> AbstractChunker:
        """The chunker for positions of width `dim`. Raises `ValueError` for settings that do not fit."""
        given = {"dim": dim, "implementation": implementation}
        pool = construct(self.pool, self._arguments(self.pool), {**given, "key": named_key(key, "pool")})
        assert isinstance(pool, AbstractDownsampler)
        pool = WithBoundary(pool, implementation) if self.boundary else pool
        context = ChunkerContext(dim, pool, named_key(key, "chunker"), implementation, trains_router)
        if is_configuration(self.chunker.cls):
            made = self.chunker.cls(**self._arguments(self.chunker)).build(context)
        else:
            given |= {"key": context.key, "pool": pool}
            made = construct(self.chunker, self._arguments(self.chunker), given)
        made = Chunker(pool, made) if isinstance(made, AbstractUpsampler) else made
        assert isinstance(made, AbstractChunker)
        return made

    def _arguments(self, part: Part) -> dict[str, object]:
        settings = self.sections.get(part.section)
        if settings is None:
            return {}
        assert dataclasses.is_dataclass(settings)
        return {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
