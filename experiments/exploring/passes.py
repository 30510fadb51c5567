"""What a model makes of a text, and how it goes on, in pieces small enough to be given up in between."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from estimators.bounds import require_within
from experiments.config.errors import NOT_NUMBERS, ConfigError
from experiments.evaluation.byte_scores import ByteScores
from experiments.evaluation.windows import PositionScores, Window, positions_of, window_keys, windows_of
from experiments.scoring.models import OpenModel
from experiments.scoring.score import BoundaryChoice, score_positions, text_boundaries
from experiments.scoring.texts import text_of
from unet import Sampling, TextBoundaries, TextStream, utf8
from unet.decoding.generate import Piece, joined
from unet.decoding.sampling import NumBytes, Temperature
from unet.tokens.model import TokenModel

LENGTHS = tuple(64 * 4**power for power in range(10))
"""Texts are padded to one of these lengths, so that few programs are compiled."""
BATCH_POSITIONS = 2**12
"""Positions that are computed at once of a text that is longer than a window."""
STREAMED = 8
"""Bytes between two updates of a text that goes on."""
KEPT_BYTES = 2**28
"""Of the scores of windows, and of the text in them, that are kept for each model."""
LONGEST_PROMPT = 4096
"""Bytes of a text, its last, that a continuation reads."""


@dataclass(frozen=True)
class Asked:
    """What is asked about a text: its bytes, how boundaries are chosen, and with which seed."""

    content: bytes
    boundaries: BoundaryChoice
    seed: int


def padded_to(positions: int, context: int) -> int:
    """The length that so many positions are padded to."""
    return min(context, next((length for length in LENGTHS if length >= positions), context))


def program_of(asked: Asked, context: int) -> tuple[object, ...]:
    """What the compiled program that reads a text depends on, but for the room that it needs for tokens."""
    positions = len(asked.content) + 1
    return padded_to(positions, context), positions > context, asked.boundaries


@dataclass(frozen=True)
class _Key:
    """What the scores of a window depend on; `seed` is None where boundaries are not drawn."""

    model: Hashable
    seed: int | None
    window: Window
    text: bytes


def _size(key: _Key, scores: PositionScores) -> int:
    return len(key.text) + sum(of.nbytes for of in vars(scores).values())


class WindowMemory:
    """The scores of the latest windows of a model: where a long text changes, those before are not computed again."""

    def __init__(self) -> None:
        self._kept: OrderedDict[_Key, PositionScores] = OrderedDict()
        self._bytes = 0

    @property
    def bytes(self) -> int:
        """The size of what is kept."""
        return self._bytes

    def scores(
        self,
        model: Hashable,
        asked: Asked,
        windows: Sequence[Window],
        compute: Callable[[list[Window]], PositionScores],
    ) -> PositionScores:
        """Those of `windows` of the one document that is asked about, in order; `compute` scores those that are not known.
        `model` tells models apart."""
        drawn = asked.seed if asked.boundaries == "drawn" else None
        keys = [
            _Key(model, drawn, window, positions_of(asked.content, window.start, window.stop + 1).tobytes())
            for window in windows
        ]
        lacking = {key: window for key, window in zip(keys, windows, strict=True) if key not in self._kept}
        if lacking:
            self._keep(lacking, compute(list(lacking.values())))
        found = [self._kept[key] for key in keys]
        for key in keys:
            self._kept.move_to_end(key)
        while self._bytes > KEPT_BYTES:
            self._bytes -= _size(*self._kept.popitem(last=False))
        return PositionScores.joined(found)

    def _keep(self, windows: Mapping[_Key, Window], scores: PositionScores) -> None:
        first = 0
        for key, window in windows.items():
            last = first + window.stop - window.counted
            # A slice would hold on to the scores of all windows that were computed with it.
            kept = PositionScores(**{name: of[first:last].copy() for name, of in vars(scores).items()})
            self._kept[key] = kept
            self._bytes += _size(key, kept)
            first = last


def boundaries_in(
    opened: OpenModel,
    asked: Asked,
    context: int,
    memory: WindowMemory,
    advance: Callable[[int], None] = lambda bytes: None,
) -> TextBoundaries:
    """Those of `experiments.shade` with the same settings. `advance` is told of numbers of bytes as they are done, and may raise
    to give up. Raises `ConfigError` for text that no model can read."""
    if not asked.content:
        return _nothing(opened)
    text = text_of(asked.content, "the text", "the text")
    windows = list(windows_of(0, text.bytes, context, max(1, context // 2)))
    length = padded_to(max(window.stop - window.start for window in windows), context)
    batch = 1 if len(windows) == 1 else max(1, BATCH_POSITIONS // length)

    def compute(some: Sequence[Window]) -> PositionScores:
        keys = window_keys(asked.seed, 0, some) if asked.boundaries == "drawn" and opened.draws else None
        return score_positions(opened.model, text.documents, some, keys, context=length, batch=batch, advance=advance)

    # The tokens of a tokenizer are those of the whole text.
    whole = isinstance(opened.model, TokenModel)
    scores = compute(windows) if whole else memory.scores(opened.step, asked, windows, compute)
    found = text_boundaries(asked.content, ByteScores.of(text, [scores], opened.levels))
    if not np.isfinite(found.log_prob).all():
        raise ConfigError(f"{opened.name}: {NOT_NUMBERS}")
    return found


def _nothing(opened: OpenModel) -> TextBoundaries:
    none = np.zeros(0, np.float32)
    inner = np.zeros((0, max(0, opened.levels - 1)), np.float32)
    return TextBoundaries(b"", none, none, none, np.zeros(0, np.uint8), opened.levels, inner)


def prompt_of(content: bytes) -> bytes:
    """The end of a text that a continuation reads, from the beginning of a character on."""
    first = cut = max(0, len(content) - LONGEST_PROMPT)
    # No character has more than three bytes behind its first; more of them are none.
    while first > 0 and cut < min(first + 3, len(content)) and 0x80 <= content[cut] <= 0xBF:
        cut += 1
    return content[cut:]


def continuation(opened: OpenModel, asked: Asked, *, max_bytes: int, temperature: float) -> Iterator[Piece]:
    """What a model adds to a text, each time all of it so far, without an incomplete last character while it goes on.

    Raises `ConfigError` for text that no model can read, and `ValueError` for numbers out of range.
    """
    require_within("temperature", temperature, Temperature)
    require_within("max_bytes", max_bytes, NumBytes)
    prompt = prompt_of(asked.content)
    stream = TextStream(
        opened.model,
        [text_of(prompt, "the text", "the text").documents[0] if prompt else b""],
        max_bytes=max_bytes,
        # As the key of a text's only window: it goes on from the boundaries that are shown.
        key=jax.random.fold_in(jax.random.key(asked.seed), 0),
        sampling=Sampling(temperature),
        greedy_boundaries=asked.boundaries == "greedy",
        chunk=STREAMED,
    )
    pieces: list[Piece] = []
    for (piece,) in stream:
        if piece is None:
            continue
        if not np.isfinite(piece.logprobs).all():
            raise ConfigError(f"{opened.name}: {NOT_NUMBERS}")
        pieces.append(piece)
        whole = joined(pieces)
        yield whole if whole.finish is not None else _whole_characters(prompt, whole)


def _whole_characters(prompt: bytes, piece: Piece) -> Piece:
    size = max(0, utf8.whole_characters(prompt + piece.bytes) - len(prompt))
    return Piece(piece.bytes[:size], piece.logprobs[:size], piece.boundary_depth[:size], None)
