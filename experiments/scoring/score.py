"""Scores of a model on a text, chunk after chunk, each computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Array, Key

from experiments.evaluation.byte_scores import ByteScores, Text
from experiments.evaluation.token_windows import score_token_windows
from experiments.evaluation.windows import PositionScores, Window, score_windows, window_keys, windows_of
from experiments.scoring.cache import ScoreCache, chunk_key
from experiments.scoring.models import OpenModel
from unet import TextBoundaries
from unet.language_model import AbstractLanguageModel
from unet.tokens.model import TokenModel

CHUNK = 2**17
"""Positions that are computed, and kept, at once."""
BATCH_POSITIONS = 2**14
"""Positions of a batch."""

BoundaryChoice = Literal["drawn", "greedy"]


@dataclass(frozen=True)
class Plan:
    """How texts are scored: windows of `context` bytes that move by `stride`, with `samples` of boundaries drawn with a
    `seed`, or with greedy ones."""

    context: int
    stride: int
    boundaries: BoundaryChoice = "drawn"
    samples: int = 1
    seed: int = 0

    def passes_of(self, opened: OpenModel) -> int:
        """How often a model goes through a text: nothing is drawn in greedy passes, nor without a token level."""
        return self.samples if self.boundaries == "drawn" and opened.draws else 1

    @property
    def batch(self) -> int:
        """Windows beside each other."""
        return max(1, BATCH_POSITIONS // self.context)


def score_text(
    opened: OpenModel, text: Text, plan: Plan, cache: ScoreCache, advance: Callable[[int], None] = lambda bytes: None
) -> ByteScores:
    """The scores of all bytes of a text. What the cache has of them is not computed again; what is computed is kept there.

    `advance` is told of numbers of bytes as they are done, over all samples.
    """
    windows = [
        window
        for number, size in enumerate(text.sizes)
        for window in windows_of(number, int(size), plan.context, plan.stride)
    ]
    samples = [
        PositionScores.joined(
            [_chunk(opened, text, plan, cache, chunk, sample, advance) for chunk in chunks_of(windows)]
        )
        for sample in range(plan.passes_of(opened))
    ]
    return ByteScores.of(text, samples, opened.levels)


def chunks_of(windows: Sequence[Window]) -> Iterator[list[Window]]:
    """Consecutive windows in groups of `CHUNK` counted positions or a few more."""
    chunk: list[Window] = []
    size = 0
    for window in windows:
        chunk.append(window)
        size += window.stop - window.counted
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _chunk(
    opened: OpenModel,
    text: Text,
    plan: Plan,
    cache: ScoreCache,
    windows: Sequence[Window],
    sample: int,
    advance: Callable[[int], None],
) -> PositionScores:
    drawn = (plan.seed, sample) if plan.boundaries == "drawn" and opened.draws else None
    key = chunk_key(opened.digest, text.documents, windows, drawn, plan.context)
    positions = sum(window.stop - window.counted for window in windows)
    kept = cache.read(key, positions)
    if kept is not None:
        advance(positions)
        return kept
    keys = None if drawn is None else window_keys(*drawn, windows)
    scores = score_positions(
        opened.model, text.documents, windows, keys, context=plan.context, batch=plan.batch, advance=advance
    )
    cache.write(key, scores)
    return scores


def score_positions(
    model: AbstractLanguageModel,
    documents: Sequence[bytes],
    windows: Sequence[Window],
    keys: Key[Array, " windows"] | None,
    *,
    context: int,
    batch: int,
    cuts: Sequence[int] = (),
    advance: Callable[[int], None] = lambda positions: None,
) -> PositionScores:
    """`score_windows` for a model of bytes or of tokens. `cuts`: for each document, the bytes of a context, over whose end no
    token of a tokenizer reaches."""
    if isinstance(model, TokenModel):
        return score_token_windows(model, documents, windows, keys, batch=batch, cuts=cuts, advance=advance)
    return score_windows(model.unet, documents, windows, keys, context=context, batch=batch, advance=advance)


def text_boundaries(content: bytes, scores: ByteScores) -> TextBoundaries:
    """The first sample of the scores of a text of one document."""
    prob = scores.prob[0] if scores.levels else np.full_like(scores.prob[0], np.nan)
    known = scores.log_prob[0], scores.early_log_prob[0], prob, scores.depth[0], scores.levels
    return TextBoundaries(content, *known, scores.inner_prob[0])
