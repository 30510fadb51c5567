"""Generate text with a trained model: `python -m experiments.generate RUN --prompt "The "`."""

from __future__ import annotations

import base64
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import jax
import numpy as np
import tyro

from estimators.bounds import Count, Seed, Share
from experiments.command import command_line
from experiments.config.arguments import expanded
from experiments.config.errors import NOT_NUMBERS, ConfigError, require, require_bounds
from experiments.devices import CPU_DEVICES, settle_cpu_devices
from experiments.launch import program
from experiments.reporting.display import Display
from experiments.reporting.texts import AbstractTexts, standard_output
from experiments.scoring.models import open_model
from experiments.terminal import write_output
from unet import Generation, Sampling, TextStream
from unet.decoding.generate import CHUNK, Piece, Throughput, joined
from unet.decoding.sampling import NumBytes, Temperature, TopK, TopP
from unet.decoding.score import Texts

STREAMED = 8
"""Bytes between two updates of a streamed text."""


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt with a trained model."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a run, finished or not, or of an exported model, a .safetensors file, hub:owner/name, or a published model by
    name (facebook/blt-1b) or file."""
    step: Count | None = None
    """Use the checkpoint of this step of the run; by default the finished model or, before that, the newest checkpoint."""
    prompt: str = ""
    """Text to continue; - reads it from standard input."""
    num: Texts = 1
    """Number of texts, sampled independently."""
    max_bytes: NumBytes = 256
    """Maximum bytes of each text after the prompt."""
    temperature: Temperature = 1.0
    """Sampling temperature of bytes; 0 is greedy decoding."""
    top_k: TopK | None = None
    """Sample only from this number of most probable bytes."""
    top_p: TopP | None = None
    """Nucleus sampling: sample only from the smallest set of most probable bytes whose probabilities sum to at least this."""
    min_p: Share | None = None
    """Sample only from bytes with at least this fraction of the highest probability."""
    stop: tuple[str, ...] = ()
    """Stop strings. A text ends before the first one."""
    utf8: bool = False
    """Sample only bytes that keep the text valid UTF-8."""
    greedy_boundaries: bool = False
    """Greedy boundaries: end a token wherever p > 0.5."""
    seed: Seed = 0
    """Seed of bytes and boundaries."""
    show_boundaries: bool = False
    """Mark the ends of tokens: · of the outermost level, │ of two levels, ┃ of more."""
    stream: bool = False
    """Print the text while it is generated."""
    plugin: tuple[str, ...] = ()
    """Modules with classes of your own that the model holds, as package.module."""
    json: bool = False
    """Print one JSON document instead."""

    def __post_init__(self):
        require_bounds(self)
        require(not (self.json and self.stream), "--json prints one document at the end: leave out --stream")


def generate(config: GenerateConfig, display: Display) -> None:
    """Load the model, generate, and print the texts. Raises `ConfigError`, `LoadError` and `OutputClosed`."""
    model = open_model(expanded(config.run), config.step, config.plugin).model
    try:
        stream = TextStream(
            model,
            [_prompt(config)] * config.num,
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
    output = standard_output(marks=config.show_boundaries)
    texts = stream_texts(stream, output) if config.stream else generate_texts(stream)
    if config.json:
        content = json.dumps(document(config, texts, stream.throughput), allow_nan=False)
        write_output(content + "\n")
    elif not config.stream:
        output.write(texts)
    display.note(report(texts, stream.throughput))


def _prompt(config: GenerateConfig) -> bytes:
    if config.prompt != "-":
        return os.fsencode(config.prompt)
    if sys.stdin is None:
        raise ConfigError("--prompt - reads standard input, which is closed")
    return sys.stdin.buffer.read()


def generate_texts(stream: TextStream) -> tuple[Generation, ...]:
    """Generate all texts to their ends. Raises `ConfigError` where the model's probabilities are no numbers."""
    pieces: list[list[Piece]] = [[] for _ in stream.prompts]
    for new in stream:
        _add(pieces, new)
    return _so_far(stream, pieces)


def stream_texts(stream: TextStream, output: AbstractTexts) -> tuple[Generation, ...]:
    """The same, and print them meanwhile, in complete characters."""
    pieces: list[list[Piece]] = [[] for _ in stream.prompts]
    with output.growing(len(pieces)):
        for new in stream:
            _add(pieces, new)
            output.grow(_so_far(stream, pieces))
    return _so_far(stream, pieces)


def _add(pieces: Sequence[list[Piece]], new: Sequence[Piece | None]) -> None:
    for parts, piece in zip(pieces, new, strict=True):
        if piece is None:
            continue
        if not np.isfinite(piece.logprobs).all():
            raise ConfigError(f"{NOT_NUMBERS}; name another model")
        parts.append(piece)


def _so_far(stream: TextStream, pieces: Sequence[Sequence[Piece]]) -> tuple[Generation, ...]:
    generated = (joined(parts) for parts in pieces)
    return tuple(map(Generation, stream.prompts, stream.prompt_boundary_depth, generated))


def document(config: GenerateConfig, texts: Sequence[Generation], throughput: Throughput) -> dict[str, object]:
    """The output of `--json`: settings, texts and throughput. Boundary positions of a text are counted from the end of the
    prompt."""
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
    """A summary in one line: bytes, bits per byte, speed, and steps with the token level."""
    nats = np.concatenate([text.piece.logprobs for text in texts])
    bits = -float(nats.mean()) / math.log(2) if nats.size else math.nan
    speed = "" if math.isnan(throughput.bytes_per_second) else f", {throughput.bytes_per_second:.0f} bytes/s"
    num_bytes = sum(len(text.piece.bytes) for text in texts)
    steps = f"the token level ran in {throughput.token_steps} of {throughput.steps} steps"
    return f"{num_bytes} bytes at {bits:.3f} bits each{speed}; {steps}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    settle_cpu_devices(CPU_DEVICES)
    return command_line(GenerateConfig, generate, "experiments.generate", arguments)


if __name__ == "__main__":
    program(main)
