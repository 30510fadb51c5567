"""Generate text with a trained model: `python -m experiments.generate RUN --prompt "The "`."""

from __future__ import annotations

import base64
import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated

import jax
import numpy as np
import tyro
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from experiments.config.errors import ConfigError, require
from experiments.evaluation.segmentation import character_spans
from experiments.launch import with_large_pages
from experiments.reporting.display import Display, command_line
from unet import Generation, Sampling, TextStream, utf8
from unet.decoding.generate import CHUNK, Piece, Throughput, joined
from unet.files.saving import load

STREAMED = 8
"""Bytes between two updates of a text that is streamed."""

MARKS = ("·", "│", "┃")
"""Stand behind the byte with which a token closes: at the outermost level only, at the one inside it too, further inside."""


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt with a trained model."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a finished run or of an exported model, a .safetensors file, or hub:owner/name."""
    prompt: str = ""
    """What to continue; - reads it from standard input."""
    num: int = 1
    """Texts to generate, sampled independently."""
    max_bytes: int = 256
    """Bytes of each text beyond the prompt, at most."""
    temperature: float = 1.0
    """Sampling temperature of bytes; 0 always takes the most probable one."""
    top_k: int | None = None
    """Sample from this many most probable bytes."""
    top_p: float | None = None
    """Sample from the smallest set of most probable bytes whose probabilities sum to this."""
    min_p: float | None = None
    """Sample from bytes at least this fraction as probable as the most probable one."""
    stop: tuple[str, ...] = ()
    """Strings before which a text ends."""
    utf8: bool = False
    """Sample only bytes that keep the text valid UTF-8."""
    greedy_boundaries: bool = False
    """Do not sample boundaries: close a token wherever p > 0.5."""
    seed: int = 0
    """Seed of bytes and boundaries."""
    show_boundaries: bool = False
    """Mark where tokens close: · of the outermost level, │ of it and the one inside, ┃ of more."""
    stream: bool = False
    """Show the text while it is generated."""
    json: bool = False
    """One JSON document on standard output instead."""

    def __post_init__(self):
        require(self.num >= 1 and self.max_bytes >= 1, "--num and --max-bytes must be at least 1")
        require(not (self.json and self.stream), "--json is one document, written at the end: leave out --stream")


def generate(config: GenerateConfig, display: Display) -> None:
    """Load, generate, show."""
    model = load(config.run).model
    prompt = sys.stdin.buffer.read() if config.prompt == "-" else os.fsencode(config.prompt)
    try:
        stream = TextStream(
            model,
            [prompt] * config.num,
            max_bytes=config.max_bytes,
            key=jax.random.key(config.seed),
            sampling=Sampling(config.temperature, config.top_k, config.top_p, config.min_p),
            stop=[os.fsencode(stop) for stop in config.stop],
            valid=config.utf8,
            greedy_boundaries=config.greedy_boundaries,
            chunk=STREAMED if config.stream else CHUNK,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    texts = followed(stream, config) if config.stream else written(stream)
    if config.json:
        sys.stdout.write(json.dumps(document(config, texts, stream.throughput)) + "\n")
    elif not config.stream:
        console = _console()
        for number, text in enumerate(texts):
            if config.num > 1:
                console.rule(f"{number + 1}", style="dim")
            console.print(shown(text, marks=config.show_boundaries))
    display.note(report(texts, stream.throughput))


def written(stream: TextStream) -> tuple[Generation, ...]:
    """All texts to their ends."""
    pieces: list[list[Piece]] = [[] for _ in stream.prompts]
    for now in stream:
        for mine, piece in zip(pieces, now, strict=True):
            mine += [] if piece is None else [piece]
    return _so_far(stream, pieces)


def followed(stream: TextStream, config: GenerateConfig) -> tuple[Generation, ...]:
    """All texts to their ends, shown as they come, in whole characters."""
    pieces: list[list[Piece]] = [[] for _ in stream.prompts]
    with _screen(len(pieces)) as show:
        for now in stream:
            for mine, piece in zip(pieces, now, strict=True):
                mine += [] if piece is None else [piece]
            show([shown(text, marks=config.show_boundaries) for text in _so_far(stream, pieces)])
    return _so_far(stream, pieces)


def _so_far(stream: TextStream, pieces: Sequence[Sequence[Piece]]) -> tuple[Generation, ...]:
    whole = (joined(mine) for mine in pieces)
    return tuple(map(Generation, stream.prompts, stream.prompt_boundary_depth, whole))


@contextmanager
def _screen(count: int):
    """A function that shows texts again and again: one text grows on any output, several change in place on a terminal."""
    console = _console()
    if count == 1:
        shown_before = 0

        def grow(texts: Sequence[Text]) -> None:
            nonlocal shown_before
            console.print(texts[0][shown_before:], end="")
            console.file.flush()
            shown_before = len(texts[0])

        yield grow
        console.print()
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:

        def change(texts: Sequence[Text]) -> None:
            live.update(
                Group(*(Text(f"{n + 1}  ", style="dim").append(text) for n, text in enumerate(texts))), refresh=True
            )

        yield change


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def shown(text: Generation, *, marks: bool) -> Text:
    """Prompt and text in whole characters, the prompt fainter; behind a character with which a token closes a mark, if asked
    for. What is no UTF-8 is U+FFFD; a last character that is not complete is left out until the text has ended."""
    content = text.prompt + text.piece.bytes
    end = len(content) if text.piece.finish is not None else max(utf8.whole_characters(content), len(text.prompt))
    closed = np.concatenate([text.prompt_boundary_depth, text.piece.boundary_depth])
    result = Text()
    for first, last in character_spans(content[:end]):
        character = content[first:last].decode("utf-8", errors="replace")
        result.append(character, style="dim" if first < len(text.prompt) else "")
        depth = int(closed[first:last].max())
        if marks and depth:
            result.append(MARKS[min(depth, len(MARKS)) - 1], style="dim cyan")
    return result


def document(config: GenerateConfig, texts: Sequence[Generation], throughput: Throughput) -> dict[str, object]:
    """What `--json` writes: the settings, the texts, and what they cost. Bytes are counted from the end of the prompt."""
    return {
        "run": config.run,
        "settings": {name: value for name, value in asdict(config).items() if name not in ("run", "json", "stream")},
        "prompt_boundaries": np.flatnonzero(texts[0].prompt_boundaries).tolist(),
        "prompt_boundary_depth": texts[0].prompt_boundary_depth.tolist(),
        "texts": [
            {
                "text": text.text,
                "base64": base64.b64encode(text.piece.bytes).decode(),
                "finish": text.piece.finish,
                "bytes": len(text.piece.bytes),
                "log_prob": float(text.piece.logprobs.sum(dtype=np.float64)),
                "logprobs": [round(float(value), 6) for value in text.piece.logprobs],
                "boundaries": np.flatnonzero(text.piece.boundaries).tolist(),
                "boundary_depth": text.piece.boundary_depth.tolist(),
            }
            for text in texts
        ],
        "throughput": {
            **asdict(throughput),
            "bytes_per_second": None if math.isnan(throughput.bytes_per_second) else throughput.bytes_per_second,
            "token_steps_per_step": throughput.token_steps / throughput.steps,
        },
    }


def report(texts: Sequence[Generation], throughput: Throughput) -> str:
    """One line about what was generated."""
    nats = np.concatenate([text.piece.logprobs for text in texts])
    bits = -float(nats.mean()) / math.log(2) if nats.size else math.nan
    speed = "" if math.isnan(throughput.bytes_per_second) else f", {throughput.bytes_per_second:.0f} bytes/s"
    written = sum(len(text.piece.bytes) for text in texts)
    ran = f"the token level ran in {throughput.token_steps} of {throughput.steps} steps"
    return f"{written} bytes at {bits:.3f} bits each{speed}; {ran}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, 2 for a user's error, 130 after Ctrl-C."""
    try:
        return command_line(GenerateConfig, generate, "experiments.generate", arguments)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    with_large_pages()
    sys.exit(main())
