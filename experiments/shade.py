"""Show where models end tokens in a text: `python -m experiments.shade RUN [MODEL …] --text "a text"`."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console

from estimators.bounds import Count, Length, Seed
from experiments.command import command_line
from experiments.config.errors import NOT_NUMBERS, ConfigError, require, require_bounds
from experiments.evaluation.byte_scores import Text
from experiments.launch import program
from experiments.reporting.display import Display
from experiments.reporting.pictures import boundaries_picture
from experiments.scoring.cache import ScoreCache
from experiments.scoring.models import OpenModel, open_model
from experiments.scoring.per_byte import require_pyarrow
from experiments.scoring.plans import context_of
from experiments.scoring.score import BoundaryChoice, Plan, score_text, text_boundaries
from experiments.scoring.texts import read_file, text_of
from experiments.terminal import write_output
from unet import TextBoundaries
from unet.files.saving import write_atomically
from unet.shading import svg
from unet.shading.html import fragment, page

SUFFIXES = (".html", ".svg", ".png", ".parquet")


@dataclass(frozen=True)
class ShadeConfig:
    """Show where models end tokens in a text, and what each byte costs them."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of runs, finished or not, or of exported models; .safetensors or .pt files; hub:owner/name; or published H-Nets."""
    text: str | None = None
    """A text; - reads standard input, byte for byte."""
    file: Path | None = None
    """A file as the text, byte for byte."""
    out: tuple[Path, ...] = ()
    """Files to write: .html (a page), .svg (a picture), .png (one of the beginning), .parquet (a row for each byte and model)."""
    step: Count | None = None
    """Use the checkpoint of this step of each run; by default the finished model or, before that, the newest checkpoint."""
    boundaries: BoundaryChoice = "drawn"
    """drawn: as in generation, with --seed; greedy: where p > 0.5."""
    seed: Seed = 0
    """Seed of drawn boundaries."""
    context: Length | None = None
    """Bytes that a model reads at once, moved by half of that; by default the length of the runs' sequences, 4096 without one."""
    overwrite: bool = False
    """Replace existing files."""
    json: bool = False
    """Print one JSON document instead."""
    plugin: tuple[str, ...] = ()
    """Modules with classes of your own that the models hold, as package.module."""

    def __post_init__(self):
        require(bool(self.models), "name at least one model")
        require(len(set(self.models)) == len(self.models), "each model is named once")
        require_bounds(self)
        require((self.text is None) != (self.file is None), "name a text: --text 'a text', --text - or --file FILE")
        for path in self.out:
            require(
                path.suffix in SUFFIXES,
                f"--out {path}: the name says what is written, and must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}",
            )


def shade(config: ShadeConfig, display: Display) -> None:
    """Read the text and the models, and show or write what was asked for. Raises `ConfigError`, `DataError` and `LoadError`."""
    _require_writable(config)
    text = _text(config)
    models = [open_model(where, config.step, config.plugin) for where in config.models]
    context = config.context or context_of(one.config for one in models)
    plan = Plan(context, max(1, context // 2), config.boundaries, 1, config.seed)
    shaded = {one.name: _boundaries(one, text, plan) for one in models}
    if config.json:
        write_output(json.dumps(document(shaded), allow_nan=False) + "\n")
    else:
        _show(shaded)
    for path in config.out:
        _write(path, shaded, text.name)
        display.note(f"see {path}")


def _require_writable(config: ShadeConfig) -> None:
    for path in config.out:
        require(path.parent.is_dir(), f"--out {path}: there is no folder {path.parent}")
        require(not path.is_dir(), f"--out {path} is a folder: name a file")
        require(
            config.overwrite or not path.exists(),
            f"--out {path} exists: replace it (--overwrite) or name another file",
        )
        if path.suffix == ".parquet":
            require_pyarrow("--out")


def _text(config: ShadeConfig) -> Text:
    if config.file is not None:
        return read_file(config.file, None, "--file")
    assert config.text is not None
    if config.text != "-":
        return text_of(os.fsencode(config.text), "a text", "--text")
    require(sys.stdin is not None, "--text - reads standard input, which is closed")
    return text_of(sys.stdin.buffer.read(), "standard input", "standard input")


def _boundaries(opened: OpenModel, text: Text, plan: Plan) -> TextBoundaries:
    scores = score_text(opened, text, plan, ScoreCache(None))
    if not np.isfinite(scores.log_prob).all():
        raise ConfigError(f"{opened.name}: {NOT_NUMBERS}; name another model")
    return text_boundaries(text.documents[0], scores)


def _show(shaded: Mapping[str, TextBoundaries]) -> None:
    terminal = sys.stdout is not None and sys.stdout.isatty()
    console = Console(file=None if terminal else io.StringIO(), highlight=False, emoji=False, soft_wrap=True)
    for name, one in shaded.items():
        heading = f"{name}: {one.summary()}"
        if terminal:
            console.print(heading, style="dim", markup=False)
            console.print(one)
        else:
            marked = "".join(f"{character.text}{character.mark}" for character in one.characters)
            write_output(f"{heading}\n{marked}\n")


def document(shaded: Mapping[str, TextBoundaries]) -> dict[str, object]:
    """What `--json` prints: for each model bits per byte, and for each level the offsets at which its tokens begin; for each byte
    its bits and the probability of a boundary."""
    return {
        "models": [
            {
                "model": name,
                "bytes": len(one.text),
                "bpb": one.bits_per_byte,
                "tokens": [_starts(one, level) for level in range(one.levels)],
                "bits": [round(float(bits), 4) for bits in one.bits],
                "boundary_prob": [round(float(prob), 6) for prob in one.prob] if one.levels else None,
            }
            for name, one in shaded.items()
        ]
    }


def _starts(one: TextBoundaries, level: int) -> list[int]:
    numbers = one.token(level)
    return [int(place) for place in np.flatnonzero(np.diff(numbers, prepend=-1))]


def _write(path: Path, shaded: Mapping[str, TextBoundaries], title: str) -> None:
    try:
        if path.suffix == ".parquet":
            _write_parquet(path, shaded)
        elif path.suffix == ".png":
            write_atomically(path, boundaries_picture([one.characters for one in shaded.values()], "Boundaries"))
        else:
            notes = [f"{name}: {one.summary()}" for name, one in shaded.items()]
            texts = [one.characters for one in shaded.values()]
            own = path.suffix == ".svg"
            content = svg.picture(texts, notes) if own else page(f"Boundaries in {title}", fragment(texts, notes))
            write_atomically(path, content)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error.strerror or error}") from None


def _write_parquet(path: Path, shaded: Mapping[str, TextBoundaries]) -> None:
    import pyarrow
    import pyarrow.parquet

    tables = [
        one.to_arrow().add_column(0, "model", pyarrow.array([name] * len(one.text), pyarrow.string()))
        for name, one in shaded.items()
    ]
    buffer = pyarrow.BufferOutputStream()
    # Models with fewer levels have no values where others have boundaries.
    pyarrow.parquet.write_table(pyarrow.concat_tables(tables, promote_options="default"), buffer)
    write_atomically(path, buffer.getvalue().to_pybytes())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    return command_line(ShadeConfig, shade, "experiments.shade", arguments)


if __name__ == "__main__":
    program(main)
