"""The vocabulary of a byte-pair encoding: learned from training text, and cut to the target rate."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from estimators.base import BOS, Layout
from estimators.routers.prefixes import PrefixTree, find_size, train_vocabulary
from estimators.settings import TextBatches, TrainingText

RATE_BYTES = 2**19
"""Training text that rates are measured on, at most."""
RATE_SHARE = 1 / 8
"""Fraction of the text, at most, that the vocabulary does not see, so that its rate can be measured there."""


class Vocabulary(eqx.Module):
    """The tokens of a byte-pair encoding, single bytes first, as their joined `text` and the place where each `ends`.

    `rate` is the fraction of bytes of training text at which a token begins, `learned_from` the number of bytes that the tokens
    were learned from, and `apart` says whether the rate was measured on other text.
    """

    text: UInt8[Array, " bytes"]
    ends: Int[Array, " size"]
    rate: float = eqx.field(static=True)
    learned_from: int = eqx.field(static=True)
    apart: bool = eqx.field(static=True)

    def __init__(self, tokens: Sequence[bytes], rate: float, learned_from: int = 0, apart: bool = True):
        self.text = jnp.asarray(np.frombuffer(b"".join(tokens), np.uint8))
        self.ends = jnp.asarray(np.cumsum([len(token) for token in tokens]), jnp.int32)
        self.rate, self.learned_from, self.apart = rate, learned_from, apart

    @property
    def size(self) -> int:
        """The number of tokens."""
        return self.ends.shape[0]

    @property
    def tokens(self) -> tuple[bytes, ...]:
        """The tokens in order."""
        text, ends = np.asarray(self.text).tobytes(), [0, *np.asarray(self.ends).tolist()]
        return tuple(text[first:last] for first, last in itertools.pairwise(ends))

    @property
    def figures(self) -> dict[str, float | int]:
        """What the summary of a run says of it."""
        return {
            "vocabulary": self.size,
            "vocabulary_rate": self.rate,
            "vocabulary_bytes": self.learned_from,
        }


def learn_vocabulary(text: TrainingText, most_tokens: int, max_bytes: int) -> Vocabulary:
    """As many tokens as come nearest to the target rate.

    Of the text that they may see, one epoch at most, the first batches are kept from them: words that were learned are read in
    fewer tokens than others, so that a rate measured on them would be too low. Text of a single batch serves for both.
    """
    most = text.count(max_bytes)
    most_aside = min(text.count(RATE_BYTES), max(1, int(RATE_SHARE * most)))
    with text.batches() as batches:
        aside = [next(batches)]
        while len(aside) < most_aside and batches.epochs < RATE_SHARE:
            aside.append(next(batches))
        apart, read = len(aside) < most and batches.epochs < 1.0, 0

        def texts() -> Iterator[bytes]:
            nonlocal read
            for layout in _rest_of_epoch(batches, most - len(aside)) if apart else aside:
                for one in texts_of(layout):
                    read += len(one)
                    yield one

        tokens = train_vocabulary(texts(), most_tokens)
    layout = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *aside)
    found = find_size(PrefixTree(tokens), layout, text.rate)
    return Vocabulary(tokens[: found.size], found.rate, read, apart)


def texts_of(layout: Layout) -> Iterator[bytes]:
    """The text of a batch in pieces that hold no BOS."""
    for values, mask in zip(np.asarray(layout.bytes), np.asarray(layout.mask), strict=True):
        yield from (part for part in values[mask].astype(np.uint8).tobytes().split(bytes([BOS])) if part)


def _rest_of_epoch(batches: TextBatches, most: int) -> Iterator[Layout]:
    """The following batches, `most` of them at most, as long as they show text that has not been seen."""
    for layout in itertools.islice(batches, most):
        yield layout
        if batches.epochs >= 1.0:
            return
