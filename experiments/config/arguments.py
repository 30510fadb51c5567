"""Command lines made into settings."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from experiments.config.errors import ConfigError
from experiments.launch import Stream
from experiments.terminal import OutputClosed, escaped

Settings = TypeVar("Settings")

PATHS = ConstructorRegistry()
"""How tyro reads settings that are paths or whole numbers."""


@PATHS.primitive_rule
def _path(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    if kind.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: Path(expanded(words[0])),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


@PATHS.primitive_rule
def _whole_number(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    if kind.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: whole_number(words[0]),
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda number: [str(number)],
    )


def whole_number(text: str) -> int:
    """The number that a text says, which may be 12e6. Raises `ValueError`."""
    try:
        return int(text)
    except ValueError:
        if re.fullmatch(r"\d+(\.\d*)?[eE]\+?\d{1,2}", text) and (number := float(text)).is_integer():
            return int(number)
        raise


def expanded(path: str) -> str:
    """A path with the home folder for `~`, which shells leave alone in --out='~/x'. Raises `ConfigError` for an unknown user."""
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise ConfigError(f"{path}: there is no home folder of {Path(path).parts[0]}; write the path in full") from None


def parsed(settings: type[Settings], program: str, arguments: Sequence[str]) -> Settings:
    """The settings that a command line asks for. Prints help or a usage error and raises `SystemExit` (2 for an error)."""
    with usage(arguments):
        return tyro.cli(settings, prog=program, args=list(arguments), registry=PATHS)


@contextlib.contextmanager
def usage(arguments: Sequence[str]) -> Iterator[None]:
    """For a call of tyro: its messages come without control characters and are of bounded length, and it may be that nobody reads
    them. Raises `OutputClosed` then."""
    usual = all(one.isprintable() and len(one) < 1000 for one in arguments)
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as redirected:
        if sys.stdout is None:
            redirected.enter_context(contextlib.redirect_stdout(output))
        if sys.stderr is None or not usual:
            redirected.callback(_write, sys.stderr, errors)
            redirected.enter_context(contextlib.redirect_stderr(errors))
        try:
            try:
                yield
            finally:
                # Help would be written at the very end otherwise.
                print(end="", flush=True)
        except BrokenPipeError:
            raise OutputClosed from None
        finally:
            if output.getvalue():
                raise OutputClosed from None


def _write(stream: Stream | None, content: io.StringIO) -> None:
    if stream is not None:
        stream.write(_plain(content.getvalue()))


def _plain(text: str, longest: int = 3000) -> str:
    colourless = re.sub(r"\x1b\[[0-9;]*m", "", text[:longest])
    return escaped(colourless, keep="\n") + ("…\n" if len(text) > longest else "")
