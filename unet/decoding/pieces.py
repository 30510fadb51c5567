"""Generated text: its pieces, and the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Piece:
    """The next bytes of one text.

    Of a model of tokens, what belongs to a token stands at its last byte, and the other bytes of it have 0.
    `logprobs`: log-probability of each byte in nats, under the model itself, before any sampling option. `boundary_depth`: how
    many levels, counted from the outermost, closed a token at each byte (0: none). `finish` says why the text ends here, if it
    does: the model drew the byte EOS, a `stop` string appeared (neither is part of the text), or the length limit was reached.
    """

    bytes: bytes
    logprobs: np.ndarray
    boundary_depth: np.ndarray
    finish: Literal["eos", "stop", "length"] | None

    @property
    def boundaries(self) -> np.ndarray:
        """Whether the outermost level closed a token at each byte."""
        return self.boundary_depth > 0


@dataclass(frozen=True)
class Generation:
    """One text: its `prompt`, the boundary depth at each byte of the prompt, and the generated continuation as one piece."""

    prompt: bytes
    prompt_boundary_depth: np.ndarray
    piece: Piece

    @property
    def prompt_boundaries(self) -> np.ndarray:
        """Whether the outermost level closed a token at each byte of the prompt."""
        return self.prompt_boundary_depth > 0

    @property
    def text(self) -> str:
        """The generated text, with U+FFFD for invalid UTF-8."""
        return self.piece.bytes.decode("utf-8", errors="replace")


def joined(pieces: Sequence[Piece]) -> Piece:
    """Concatenate consecutive pieces."""
    return Piece(
        b"".join(piece.bytes for piece in pieces),
        np.concatenate([piece.logprobs for piece in pieces]),
        np.concatenate([piece.boundary_depth for piece in pieces]),
        pieces[-1].finish,
    )
