"""What the page asks and is told, as JSON."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from estimators.bounds import Seed, require_within
from experiments.config.errors import ConfigError, one_line, require
from experiments.exploring.held import HeldModel
from experiments.exploring.passes import Asked
from unet import TextBoundaries, utf8
from unet.decoding.pieces import Piece
from unet.shading.characters import Character, characters, clusters, visible

MOST_BYTES = 1_000_000
"""Of a text."""
PIECE = 4096
"""Signs, or numbers, that are written between two looks at whether somebody still waits."""
MOST_BODY = 2 * MOST_BYTES
"""Of a request: a text in base64, and some settings."""


@dataclass(frozen=True)
class Request:
    """What a page asks, and which page: of which models, each by its number with the step of a checkpoint (None: its end)."""

    client: str
    asked: Asked
    models: tuple[tuple[int, int | None], ...]
    values: Mapping[str, object]

    @classmethod
    def of(cls, body: bytes, count: int) -> Request:
        """From JSON, for so many models. Raises `ConfigError` and `ValueError` for what no page of ours asks."""
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            raise ConfigError("the request is no JSON") from None
        require(isinstance(values, dict), "the request must be an object")
        client, boundaries, seed = values.get("client"), values.get("boundaries"), values.get("seed")
        require(isinstance(client, str) and 0 < len(client) <= 64, "client must be a short string")
        require(boundaries in ("drawn", "greedy"), "boundaries must be drawn or greedy")
        require_within("seed", seed, Seed)
        asked = Asked(_content(values.get("text")), boundaries, seed)
        models = tuple(_model(one, count) for one in _list(values.get("models"), count))
        require(len({number for number, _ in models}) == len(models), "each model is asked once")
        return cls(client, asked, models, values)

    def number(self, name: str, default: float | int) -> float | int:
        """A number among the values."""
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name} must be a number")
        return value


def _content(text: object) -> bytes:
    try:
        content = base64.b64decode(text, validate=True) if isinstance(text, str) else None
    except (binascii.Error, ValueError):
        content = None
    if content is None:
        raise ConfigError("text must be bytes in base64")
    require(
        len(content) <= MOST_BYTES, f"the text has {len(content):,} bytes, and this page takes up to {MOST_BYTES:,}"
    )
    return content


def _list(models: object, count: int) -> Sequence[object]:
    if not isinstance(models, list) or not 1 <= len(models) <= count:
        raise ConfigError(f"models must be a list of 1 to {count} models")
    return models


def _model(one: object, count: int) -> tuple[int, int | None]:
    number, step = (one.get("model"), one.get("step")) if isinstance(one, dict) else (None, None)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
        raise ConfigError(f"there is no model {one_line(str(number), 20)}")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int)):
        raise ConfigError("step must be a whole number, or null")
    return number, step


def model_list(models: Sequence[HeldModel], context: int) -> dict[str, object]:
    """What there is: the models, with the steps of their checkpoints as they are now, and limits."""
    return {
        "context": context,
        "most_bytes": MOST_BYTES,
        "models": [
            {
                "name": visible(one.where),
                "levels": one.first.levels,
                "draws": one.first.draws,
                "parameters": one.first.parameters,
                "about": ""
                if one.first.config is None
                else visible(f"{one.first.config.estimator} on {one.first.config.dataset}"),
                "step": one.first.step,
                "steps": one.steps,
                "total_steps": one.total_steps,
                "finished": one.finished,
            }
            for one in models
        ],
    }


def nothing() -> None:
    """Do nothing."""


def answer(found: TextBoundaries, check: Callable[[], None] = nothing) -> dict[str, object]:
    """What a model makes of a text: for each sign its bytes, p, bits and depth, and p of each inner level; for each level the
    offsets at which tokens end, and their bits. What is not known is null. `check`: as in `signs`."""
    shown = found.characters
    check()
    columns = signs(found.text, shown, check)
    last = np.cumsum(np.array(columns["size"], np.int64)) - 1
    return {
        "bytes": len(found.text),
        "bpb": _rounded(found.bits_per_byte, 4),
        "levels": found.levels,
        "bytes_per_token": [_rounded(size, 3) for size in found.bytes_per_token],
        "signs": columns,
        "inner_p": [[_rounded(p, 4) for p in found.prob_of(level)[last].tolist()] for level in range(1, found.levels)],
        "ends": [_ends(found, level).tolist() for level in range(found.levels)],
        "token_bits": [_token_bits(found, level) for level in range(found.levels)],
    }


class Continued(TypedDict):
    """A text that goes on: the number of its signs, those from number `known` on, and all of its bytes."""

    count: int
    known: int
    signs: dict[str, list[object]]
    finish: str | None
    text: str


def continued(piece: Piece, known: int) -> Continued:
    """How a text goes on, for a page that has its first `known` signs."""
    values = np.frombuffer(piece.bytes, np.uint8)
    nothing = np.full(len(piece.bytes), np.nan, np.float32)
    shown = characters(values, nothing, piece.boundary_depth, piece.logprobs / -np.float32(math.log(2.0)))
    whole = signs(piece.bytes, shown)
    return {
        "count": len(whole["text"]),
        "known": known,
        "signs": {name: of[known:] for name, of in whole.items()},
        "finish": piece.finish,
        "text": base64.b64encode(piece.bytes).decode(),
    }


def signs(content: bytes, shown: Sequence[Character], check: Callable[[], None] = nothing) -> dict[str, list[object]]:
    """Columns of what is drawn as one sign each: `text` as it may be shown, `size` in bytes, `p`, `bits`, `depth`. `check` is
    called now and then, and may raise to give up."""
    sizes = [stop - start for start, stop in utf8.character_spans(content)]
    columns: dict[str, list[object]] = {"text": [], "size": [], "p": [], "bits": [], "depth": []}
    first = 0
    for number, one in enumerate(clusters(shown)):
        if number % PIECE == 0:
            check()
        last = first + len(one.text)
        columns["text"].append("⏎\n" if one.text == "\n" else visible(one.text))
        columns["size"].append(sum(sizes[first:last]))
        columns["p"].append(_rounded(one.prob, 4))
        columns["bits"].append(_rounded(one.bits, 3))
        columns["depth"].append(one.depth)
        first = last
    return columns


def json_text(value: object) -> str:
    """A value as JSON, long lists in pieces: while the encoder is at one, no other thread does anything. Raises `ValueError` for
    numbers that JSON does not have."""
    match value:
        case dict():
            return f"{{{','.join(f'{json.dumps(name)}:{json_text(one)}' for name, one in value.items())}}}"
        case [list(), *_]:
            return f"[{','.join(map(json_text, value))}]"
        case list():
            pieces = (value[first : first + PIECE] for first in range(0, len(value), PIECE))
            return f"[{','.join(json.dumps(piece, allow_nan=False)[1:-1] for piece in pieces)}]"
    return json.dumps(value, allow_nan=False)


def _ends(found: TextBoundaries, level: int) -> np.ndarray:
    return np.flatnonzero(found.closed(level)) + 1


def _token_bits(found: TextBoundaries, level: int) -> list[float | None]:
    sums = np.bincount(found.token(level), weights=found.bits) if found.text else np.zeros(0)
    return [_rounded(float(one), 2) for one in sums]


def _rounded(value: float, digits: int) -> float | None:
    return None if math.isnan(value) else round(float(value), digits)
