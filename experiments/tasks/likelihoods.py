"""Log-likelihoods of continuations after their contexts, each computed once."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from experiments.evaluation.windows import PositionScores, Window
from experiments.scoring.cache import ScoreCache, chunk_key
from experiments.scoring.models import OpenModel
from experiments.scoring.score import BATCH_POSITIONS, Plan, score_positions
from unet.tokens.batch import padded_length

CHUNK = 2**17
"""Positions, of whole windows, that are computed, and kept, at once."""


@dataclass(frozen=True)
class Request:
    """The bytes of a continuation and of the context before it."""

    context: bytes
    continuation: bytes

    @property
    def document(self) -> bytes:
        return self.context + self.continuation


@dataclass(frozen=True)
class Likelihood:
    """What a model says of a continuation, one element for each sample of its boundaries: the log-probability in nats, and
    whether every byte was the most likely one (`greedy`)."""

    log_prob: Float[np.ndarray, " samples"]
    greedy: Bool[np.ndarray, " samples"]


def continuation_windows(number: int, request: Request, context: int, stride: int) -> Iterator[Window]:
    """The windows in which the bytes of the continuation of document `number` are predicted, from at most `context` bytes.

    One window, which ends with the document, if it has room for the continuation: the bytes too many are left out at the start of
    the context. Otherwise windows that move by `stride`, as those of a whole document do (`windows_of`).
    """
    before, size = len(request.context), len(request.document)
    if size - before <= context:
        yield Window(number, 0, max(0, size - context), before, size)
        return
    start, counted, order = max(0, before + stride - context), before, 0
    while counted < size:
        stop = min(start + context, size)
        yield Window(number, order, start, counted, stop)
        start, counted, order = start + stride, stop, order + 1


def request_keys(
    seed: int, sample: int, requests: Sequence[Request], windows: Sequence[Window]
) -> Key[Array, " windows"]:
    """The keys that draw the boundaries of windows: that of the `seed`, with the sample, the CRC-32 of what the window reads of
    the context and the number of the window folded in. So what is drawn depends on nothing else that is evaluated, and all
    continuations see the same boundaries in a context that is read whole."""
    read = [requests[window.document].context[max(0, window.start - 1) :] for window in windows]
    contexts = np.array([zlib.crc32(context) for context in read], np.uint32)
    numbers = np.array([window.number for window in windows], np.uint32)
    of_sample = jax.random.fold_in(jax.random.key(seed), sample)
    of_context = jax.vmap(jax.random.fold_in, (None, 0))(of_sample, contexts)
    return jax.vmap(jax.random.fold_in)(of_context, numbers)


@dataclass(frozen=True)
class Likelihoods:
    """A model that scores requests as `plan` says. What the cache has is not computed again.

    `batch`: windows beside each other; None for as many as have `BATCH_POSITIONS` positions. `known`: what was scored before.
    """

    opened: OpenModel
    plan: Plan
    cache: ScoreCache
    batch: int | None = None
    known: dict[Request, Likelihood] = field(default_factory=dict)

    def of(self, requests: Sequence[Request], advance: Callable[[int], None] = lambda number: None) -> list[Likelihood]:
        """The likelihood of each request, in order. Requests of one length are computed together; `advance` is told how many are
        done."""
        passes = self.plan.passes_of(self.opened)
        nothing = Likelihood(np.zeros(passes), np.ones(passes, bool))
        self.known.update({request: nothing for request in requests if not request.continuation})
        new = [request for request in dict.fromkeys(requests) if request not in self.known]
        advance(len(requests) - len(new))
        for chunk, length in self._chunks(new):
            self.known.update(zip(chunk, self._chunk(chunk, length), strict=True))
            advance(len(chunk))
        return [self.known[request] for request in requests]

    def _chunks(self, requests: Sequence[Request]) -> Iterator[tuple[list[Request], int]]:
        """Requests whose windows have one padded length, the longest first."""
        by_length: dict[int, list[Request]] = {}
        sizes: dict[Request, int] = {}
        for request in requests:
            windows = list(continuation_windows(0, request, self.plan.context, self.plan.stride))
            longest = max(window.stop - window.start for window in windows)
            by_length.setdefault(padded_length(longest, self.plan.context), []).append(request)
            sizes[request] = sum(window.stop - window.start for window in windows)
        for length, some in sorted(by_length.items(), reverse=True):
            chunk: list[Request] = []
            size = 0
            for request in some:
                chunk.append(request)
                size += sizes[request]
                if size >= CHUNK:
                    yield chunk, length
                    chunk, size = [], 0
            if chunk:
                yield chunk, length

    def _chunk(self, requests: Sequence[Request], length: int) -> list[Likelihood]:
        windows = [
            window
            for number, request in enumerate(requests)
            for window in continuation_windows(number, request, self.plan.context, self.plan.stride)
        ]
        samples = [
            self._sample(requests, windows, length, sample) for sample in range(self.plan.passes_of(self.opened))
        ]
        ends = np.cumsum([len(request.continuation) for request in requests])[:-1]
        log_probs = [np.split(one.log_prob.astype(np.float64), ends) for one in samples]
        likely = [np.split(one.most_likely, ends) for one in samples]
        return [
            Likelihood(
                np.array([parts[number].sum() for parts in log_probs]),
                np.array([bool(parts[number].all()) for parts in likely]),
            )
            for number in range(len(requests))
        ]

    def _sample(
        self, requests: Sequence[Request], windows: Sequence[Window], length: int, sample: int
    ) -> PositionScores:
        drawn = (self.plan.seed, sample) if self.plan.boundaries == "drawn" and self.opened.draws else None
        documents = [request.document for request in requests]
        # Keys come from contexts, not from the numbers of documents as those of whole texts.
        key = chunk_key(f"{self.opened.digest} by context", documents, windows, drawn, length)
        kept = self.cache.read(key, sum(window.stop - window.counted for window in windows))
        if kept is not None:
            return kept
        keys = None if drawn is None else request_keys(*drawn, requests, windows)
        most = self.batch or max(1, BATCH_POSITIONS // length)
        # A power of four, so that few sizes are compiled.
        batch = min(most, 4 ** ((len(windows) - 1).bit_length() + 1 >> 1))
        cuts = [len(request.context) for request in requests]
        scores = score_positions(self.opened.model, documents, windows, keys, context=length, batch=batch, cuts=cuts)
        self.cache.write(key, scores)
        return scores


def mean_of_logs(likelihood: Likelihood) -> float:
    r"""$\frac1k \sum_s \log p_s$ over the samples, in nats."""
    return float(likelihood.log_prob.mean())


def log_of_mean(likelihood: Likelihood) -> float:
    r"""$\log \frac1k \sum_s p_s$ over the samples, in nats."""
    return float(np.logaddexp.reduce(likelihood.log_prob) - np.log(len(likelihood.log_prob)))


COMBINATIONS: Mapping[str, Callable[[Likelihood], float]] = {"mean": mean_of_logs, "log-mean-exp": log_of_mean}
"""How the samples of a request become its score."""


def is_greedy(likelihood: Likelihood) -> bool:
    """Whether every byte was the most likely one under more than half of the samples."""
    return bool(2 * likelihood.greedy.sum() > len(likelihood.greedy))
