"""Boundaries where the tokens of a byte-pair encoding begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from jaxtyping import PyTree

from estimators.base import (
    AbstractChunker,
    AbstractEstimator,
    AbstractObjective,
    AbstractRouter,
)
from estimators.bounds import LARGEST_BYTES, VocabularySize, Weight, Within, check_bounds
from estimators.objectives import Imitation, NoObjective
from estimators.routers import Guided, PrefixRouter, PrefixTree
from estimators.sections import PolicySettings
from estimators.settings import Context, EstimatorConfig, TrainingText
from estimators.vocabulary import Vocabulary, learn_vocabulary


class BPEGuided(AbstractEstimator):
    """Boundaries from a byte-pair encoding: the strongest fixed boundaries in the score-function paper."""

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(self, vocabulary: Sequence[bytes], *, chunker: AbstractChunker, rate: float | None = None):
        """`rate` is the fraction of bytes at which tokens of the vocabulary begin (see `find_size`), if known."""
        self.router = PrefixRouter(PrefixTree(vocabulary), rate)
        self.chunker, self.objective = chunker, NoObjective()


class Distilled(AbstractEstimator):
    """A `student` policy that learns a `guide`'s boundaries by cross-entropy while the model trains on them.

    In evaluation and generation the student draws the boundaries, without the guide.
    """

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(
        self, student: AbstractRouter, guide: AbstractRouter, *, chunker: AbstractChunker, weight: float = 0.1
    ):
        """`weight` multiplies the cross-entropy."""
        self.router, self.chunker, self.objective = Guided(student, guide), chunker, Imitation(weight)


@dataclass(frozen=True)
class VocabularySettings:
    """The vocabulary of a byte-pair encoding, learned from the training text."""

    vocabulary: VocabularySize = 65_536
    """Tokens to learn at most. The first so many are used whose rate comes nearest to --rate; a run says which rate that is."""
    text_bytes: Annotated[int, Within(1, LARGEST_BYTES)] = 2**24
    """Training text to learn them from, at most: the first that the run sees, and never more than it sees. Memory follows the
    different words in it: some 4 MB for each MB of English, 100 MB for each MB of a text without spaces."""

    def __post_init__(self):
        check_bounds(self)


@dataclass(frozen=True)
class BPEConfig(EstimatorConfig):
    """Boundaries of a byte-pair encoding of the training text."""

    outermost_only: ClassVar[bool] = True

    bpe: VocabularySettings = field(default_factory=VocabularySettings)

    def prepare(self, text: TrainingText) -> Vocabulary:
        return learn_vocabulary(text, self.bpe.vocabulary, self.bpe.text_bytes)

    def figures(self, prepared: PyTree) -> dict[str, float | int]:
        return prepared.figures

    def notes(self, prepared: PyTree, rate: float) -> list[str]:
        measured_on = "other" if prepared.apart else "the same"
        return [
            f"{prepared.size:,} byte-pair tokens, learned from {prepared.learned_from / 1e6:.2f} MB of training text, begin at "
            f"{prepared.rate:.4f} of the bytes of {measured_on} training text: no vocabulary of up to "
            f"{self.bpe.vocabulary:,} tokens of that text comes nearer to --rate {rate:g} (--bpe.vocabulary, --bpe.text-bytes)"
        ]

    def build(self, context: Context) -> AbstractEstimator:
        return BPEGuided(context.prepared.tokens, chunker=context.chunker, rate=context.prepared.rate)


@dataclass(frozen=True)
class DistilledConfig(BPEConfig):
    """A windowed policy that learns these boundaries by cross-entropy while the model trains on them."""

    section: ClassVar[str] = "distilled"

    policy: PolicySettings = field(default_factory=PolicySettings)
    imitation_weight: Weight = 0.1
    """Weight of the cross-entropy."""

    def __post_init__(self):
        check_bounds(self)

    def build(self, context: Context) -> AbstractEstimator:
        guide = super().build(context).router
        policy = self.policy.router(context)
        return Distilled(policy, guide, chunker=context.chunker, weight=self.imitation_weight)
