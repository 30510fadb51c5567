"""A text, and what a model says of each of its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8

from experiments.evaluation.windows import PositionScores


@dataclass(frozen=True)
class Text:
    """The documents of a text, none of them empty, and its `name` in tables."""

    name: str
    documents: tuple[bytes, ...]

    @cached_property
    def sizes(self) -> Int[np.ndarray, " documents"]:
        """The bytes of each document."""
        return np.array([len(document) for document in self.documents], np.int64)

    @property
    def bytes(self) -> int:
        return int(self.sizes.sum())

    @cached_property
    def values(self) -> UInt8[np.ndarray, " bytes"]:
        """All bytes, document after document."""
        return np.frombuffer(b"".join(self.documents), np.uint8)

    @cached_property
    def document(self) -> Int[np.ndarray, " bytes"]:
        """The number of each byte's document."""
        return np.repeat(np.arange(len(self.documents)), self.sizes)

    @cached_property
    def offset(self) -> Int[np.ndarray, " bytes"]:
        """The offset of each byte in its document."""
        starts = np.cumsum(self.sizes) - self.sizes
        return np.arange(self.bytes) - starts[self.document]

    @cached_property
    def ends(self) -> Bool[np.ndarray, " bytes"]:
        """True at the last byte of each document, after which nothing is predicted."""
        return self.offset == self.sizes[self.document] - 1

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the documents."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(len(document).to_bytes(8, "big"))
            digest.update(document)
        return digest.hexdigest()

    def totals(self, values: np.ndarray) -> np.ndarray:
        """The sums of a value of each byte over each document."""
        return np.bincount(self.document, weights=values, minlength=len(self.documents))


@dataclass(frozen=True)
class ByteScores:
    """The scores of every byte of a text, one row for each sample of its boundaries.

    `log_prob`, `early_log_prob`: log-probability in nats of the byte after those before it, from the model and from its early
    head (NaN without one). `prob`: probability of a boundary of the outermost level after the byte. `depth`: how many levels,
    counted from the outermost, closed a token there. `free`: no boundary is forced there. `levels`: token levels of the model.
    `inner_prob`: probability of a boundary of each level inside the outermost; NaN where a level outside it closed no token.
    """

    log_prob: Float32[np.ndarray, "samples bytes"]
    early_log_prob: Float32[np.ndarray, "samples bytes"]
    prob: Float32[np.ndarray, "samples bytes"]
    depth: UInt8[np.ndarray, "samples bytes"]
    free: Bool[np.ndarray, "samples bytes"]
    levels: int
    inner_prob: Float32[np.ndarray, "samples bytes inner"]

    @classmethod
    def of(cls, text: Text, samples: Sequence[PositionScores], levels: int) -> ByteScores:
        """From the scores of all positions (see `windows`): the prediction at a position is of the next one's byte."""
        # Each document has one position more than it has bytes.
        sizes = text.sizes + 1
        last = np.cumsum(sizes) - 1
        first = last - text.sizes
        return cls(
            log_prob=np.stack([np.delete(one.log_prob, last) for one in samples]),
            early_log_prob=np.stack([np.delete(one.early_log_prob, last) for one in samples]),
            prob=np.stack([np.delete(one.prob, first) for one in samples]),
            depth=np.stack([np.delete(one.depth, first) for one in samples]),
            free=np.stack([~np.delete(one.forced, first) for one in samples]),
            levels=levels,
            inner_prob=np.stack([np.delete(one.inner_prob, first, axis=0) for one in samples]),
        )

    @property
    def boundaries(self) -> Bool[np.ndarray, "samples bytes"]:
        """Whether the outermost level closed a token after the byte."""
        return self.depth > 0
