"""Boundaries before bytes that a small language model does not foresee (BLT)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import equinox as eqx
import numpy as np
from jaxtyping import PyTree

from estimators.base import (
    AbstractChunker,
    AbstractEstimator,
    AbstractObjective,
    AbstractRouter,
)
from estimators.bounds import Finite, check_bounds
from estimators.objectives import NoObjective
from estimators.routers import AbstractPatchRule, CombinedRule, EntropyRouter, GlobalRule, RiseRule
from estimators.routers.entropy import ByteModel, find_threshold, next_byte_entropy
from estimators.settings import Context, EstimatorConfig, Prerequisite, TrainingText
from estimators.vocabulary import RATE_BYTES


class Entropy(AbstractEstimator):
    """A token closes where the next byte is hard to predict (BLT)."""

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(self, router: EntropyRouter, *, chunker: AbstractChunker):
        """`router` has the byte model and the rule."""
        self.router, self.chunker, self.objective = router, chunker, NoObjective()


class Measured(eqx.Module):
    """A byte model, and the threshold on its entropies that gives the target rate."""

    model: ByteModel
    threshold: float = eqx.field(static=True)


@dataclass(frozen=True)
class EntropyConfig(EstimatorConfig):
    """Boundaries where a byte model is unsure of the next byte."""

    outermost_only: ClassVar[bool] = True
    prerequisite: ClassVar[Prerequisite | None] = Prerequisite(
        "model", "isotropic", {"isotropic": {"token_level": False}}
    )

    model: Path | None = None
    """Folder of the run that trained the byte model: one of --estimator isotropic, best without its token level; or a published
    Byte Latent Transformer, whose own is taken."""
    rule: Literal["global", "rise", "combined"] = "global"
    """A token closes where the entropy of the next byte passes a threshold, where it rises by more than one, or both (BLT). The
    threshold is found from the data: that on the rise for the rule of that name, that on the entropy for the others."""
    increase: Finite = 0.0
    """Least rise of the entropy in nats, for the combined rule."""

    def __post_init__(self):
        check_bounds(self)

    @property
    def patch_rule(self) -> Callable[[float], AbstractPatchRule]:
        """Makes the rule from a threshold."""
        if self.rule == "combined":
            return functools.partial(CombinedRule, increase=self.increase)
        return RiseRule if self.rule == "rise" else GlobalRule

    def prepare(self, text: TrainingText) -> Measured:
        """Raises `ValueError` where no threshold gives the target rate."""
        assert self.model is not None
        model = text.byte_model(str(self.model))
        measure = eqx.filter_jit(next_byte_entropy)
        with text.batches() as batches:
            layouts = list(itertools.islice(batches, text.count(RATE_BYTES)))
        entropies = np.concatenate([np.asarray(measure(model, layout)) for layout in layouts])
        positions = np.concatenate([np.asarray(layout.document_positions) for layout in layouts])
        return Measured(model, find_threshold(entropies, positions, text.rate, self.patch_rule))

    def build(self, context: Context) -> AbstractEstimator:
        found: PyTree = context.prepared
        router = EntropyRouter(found.model, self.patch_rule(found.threshold), target_rate=context.rate)
        return Entropy(router, chunker=context.chunker)
