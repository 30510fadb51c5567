"""Windows over documents for models of tokens: every token counts once, in the first window that reads its last byte.

The tokens are those of the whole document, so that all windows agree about them. A window of bytes reads the tokens that begin in
it, or one more before the first that counts. Of a token's bytes the last one has its log-probability, and the others have 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from experiments.config.errors import ConfigError
from experiments.evaluation.windows import PositionScores, Window
from unet.decoding.boundaries import BytePass, byte_pass
from unet.decoding.score import rate_of, with_enough_capacity
from unet.local_devices import LocalDevices
from unet.tokens.batch import padded_length
from unet.tokens.model import TokenModel


@dataclass(frozen=True)
class DocumentTokens:
    """The tokens of a document, BOS first, and the position at which each ends (that of BOS is 0)."""

    ids: Int[np.ndarray, " tokens"]
    ends: Int[np.ndarray, " tokens"]

    @classmethod
    def of(cls, model: TokenModel, document: bytes, cut: int = 0) -> DocumentTokens:
        """`cut`: bytes of a context, over whose end no token reaches."""
        ids = np.concatenate([model.encode(document[:cut]), model.encode(document[cut:])])
        sizes = model.tokenizer.token_sizes[ids]
        return cls(np.concatenate([[model.alphabet.bos], ids]), np.concatenate([[0], np.cumsum(sizes)]))

    def inside(self, window: Window) -> slice:
        """The tokens that a window reads or predicts."""
        begins = np.concatenate([[0], self.ends[:-1] + 1])
        counted = int(np.searchsorted(self.ends, window.counted + 1))
        first = min(int(np.searchsorted(begins, window.start)), counted - 1)
        return slice(max(first, 0), int(np.searchsorted(self.ends, window.stop, side="right")))


def score_token_windows(
    model: TokenModel,
    documents: Sequence[bytes],
    windows: Sequence[Window],
    keys: Key[Array, " windows"] | None,
    *,
    batch: int,
    cuts: Sequence[int] = (),
    advance: Callable[[int], None] = lambda positions: None,
) -> PositionScores:
    """The scores of the counted positions of `windows`, in order; arguments as in `windows.score_windows`. `cuts`: for each
    document, the bytes of a context, over whose end no token reaches."""
    tokens = functools.cache(lambda number: DocumentTokens.of(model, documents[number], cuts[number] if cuts else 0))
    groups: dict[int, list[int]] = {}
    for place, window in enumerate(windows):
        part = tokens(window.document).inside(window)
        try:
            model.inner.require_positions(part.stop - part.start)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        groups.setdefault(padded_length(part.stop - part.start, 2**30), []).append(place)
    scored: dict[int, PositionScores] = {}
    devices = LocalDevices.of(batch, model)
    inner = devices.everywhere(model.inner)
    for length, places in groups.items():
        for first in range(0, len(places), batch):
            chosen = places[first : first + batch]
            # The last batch is filled up, so that one program serves all batches of a length.
            filled = chosen + chosen[:1] * (batch - len(chosen))
            ids, mask = np.zeros((batch, length), np.int32), np.zeros((batch, length), bool)
            for row, place in enumerate(filled):
                own = tokens(windows[place].document)
                part = own.inside(windows[place])
                ids[row, : part.stop - part.start], mask[row, : part.stop - part.start] = own.ids[part], True
            own_keys = None if keys is None else keys[jnp.asarray(filled)]
            compute = functools.partial(
                byte_pass, inner, *devices.rows((jnp.asarray(ids), jnp.asarray(mask), own_keys))
            )
            result = jax.tree.map(np.asarray, with_enough_capacity(length, rate_of(inner), compute))
            for row, place in enumerate(chosen):
                scored[place] = _window_scores(
                    tokens(windows[place].document), windows[place], result, row, len(model.estimators)
                )
            advance(sum(windows[place].stop - windows[place].counted for place in chosen))
    return PositionScores.joined([scored[place] for place in range(len(windows))])


def _window_scores(tokens: DocumentTokens, window: Window, result: BytePass, row: int, levels: int) -> PositionScores:
    """The scores of the counted positions of one window, from row `row` of a pass of a model with so many levels of its own."""
    part, size = tokens.inside(window), window.stop - window.counted
    ends = tokens.ends[part]
    # The prediction of a token stands one position before its end.
    counts = np.flatnonzero((ends > window.counted) & (np.arange(len(ends)) > 0))

    def predictions(values: np.ndarray) -> np.ndarray:
        placed = np.zeros(size, np.float32)
        placed[ends[counts] - 1 - window.counted] = values[row, counts - 1]
        return placed

    most_likely = np.ones(size, bool)
    most_likely[ends[counts] - 1 - window.counted] = result.likelihoods.most_likely[row, counts - 1]
    closed = np.flatnonzero((ends >= window.counted) & (ends < window.stop))
    depth = np.zeros(size, np.uint8)
    depth[ends[closed] - window.counted] = 1 + result.likelihoods.depth[row, closed]
    # The model's own levels are inside that of the tokenizer. A model without any has a probability of 0 and no level for it.
    inner_prob = np.full((size, levels), np.nan, np.float32)
    every = np.column_stack([result.prob[row], result.inner_prob[row]])
    inner_prob[ends[closed] - window.counted] = every[closed, :levels]
    early = result.early_log_prob
    return PositionScores(
        log_prob=predictions(np.asarray(result.likelihoods.log_prob)),
        early_log_prob=np.full(size, np.nan, np.float32) if early is None else predictions(np.asarray(early)),
        prob=(depth > 0).astype(np.float32),
        depth=depth,
        forced=np.arange(window.counted, window.stop) == window.start,
        most_likely=most_likely,
        inner_prob=inner_prob,
    )
