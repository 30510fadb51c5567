"""The fenced blocks of the documentation, and what makes a command of one right."""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

from experiments.config.arguments import parsed

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

FENCE = re.compile(r"^```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^>]+) -->\s*\Z")
OWN_PARSERS = {"run": "parse", "compare": "parse_compare", "bench": "parse"}
"""Of commands that have one beside `command_line`."""
OTHERS = ("cat", "tensorboard", "jupyter", "ruff", "pyrefly")
"""Programs of others, whose arguments are not looked at."""
INLINE = re.compile(r"`(python -m experiments\.[^`\n]+)`")
CODE = re.compile(r"`([^`\n]+)`")
FLAG = re.compile(r"(?<![\w-])--([a-z][\w.-]*)(…?)")
ALL_SETTINGS = (
    ("compare", "--help"),
    *(("run", "--model", model, "--help-all") for model in ("tiny", "hnet-tiny", "blt-1B", "transformer-760M")),
)
"""Helps that have the settings of models of every kind, and those of comparisons."""


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language ("" counts as a shell's), and why it isn't run, if the page says so."""

    page: str
    line: int
    language: str
    text: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page}, line {self.line}"


def pages() -> list[str]:
    """Every page with blocks, by its path from the root."""
    found = [*(ROOT / name for name in PAGES), *(ROOT / "docs").rglob("*.md")]
    return sorted(str(path.relative_to(ROOT)) for path in found if path.is_file())


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    content = (ROOT / page).read_text()
    found = []
    for match in FENCE.finditer(content):
        said = NOT_RUN.search(content[: match.start()])
        line = content.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match["language"], match["text"], said and said["reason"]))
    return found


def inline_commands(page: str) -> list[str]:
    """Commands within sentences that are complete: they have arguments and leave nothing out."""
    content = FENCE.sub("", (ROOT / page).read_text())
    return [text for text in INLINE.findall(content) if "…" not in text and " " in text.removeprefix("python -m ")]


def inline_flags(page: str) -> set[tuple[str, bool]]:
    """The flags that sentences name, without dashes, and whether only a beginning is named."""
    content = FENCE.sub("", (ROOT / page).read_text())
    found = (match.groups() for code in CODE.findall(content) for match in FLAG.finditer(code))
    return {(name.rstrip("."), bool(rest) or name.endswith(".")) for name, rest in found}


def known_flags(capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The flags of every command, from their helps, without dashes."""
    bench = importlib.import_module("experiments.bench").Command
    names = {script.removeprefix("caesura-") for script in PROJECT["scripts"]} - {"bench", "compare", "harness", "run"}
    helps = [*((name, "--help") for name in names), *ALL_SETTINGS]
    helps += [("bench", one.__name__.lower(), "--help") for one in get_args(bench)]
    found = {"help", "help-all"}
    for name, *arguments in helps:
        with contextlib.suppress(SystemExit):
            importlib.import_module(f"experiments.{name}").main(arguments)
        found |= {flag for flag, _ in FLAG.findall(capsys.readouterr().out)}
    return found


def statements(text: str) -> list[tuple[str, ...]]:
    """The words of each command of a shell, without comments and variables set for it."""
    lines = (shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines())
    commands = (part for line in lines for part in _piped(line))
    return [tuple(words) for command in commands if (words := _without_variables(command))]


def _piped(words: list[str]) -> list[list[str]]:
    if "|" not in words:
        return [words]
    place = words.index("|")
    return [words[:place], *_piped(words[place + 1 :])]


def _without_variables(words: list[str]) -> list[str]:
    return words if not words or not re.match(r"[A-Z_]+=", words[0]) else _without_variables(words[1:])


def check_statement(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise or exit where a command is not understood: by its own parser, or by what the project says of itself."""
    program, *rest = words
    program = program.removeprefix(".venv/bin/")
    if program == "python" and rest[0] == "-m":
        package, _, name = rest[1].partition(".")
        if package == "experiments":
            parse_command(name, rest[2:], monkeypatch)
        else:
            importlib.import_module(rest[1])
    elif program == "python" and rest[0] == "-c":
        _check_code(rest[1])
    elif program in PROJECT["scripts"]:
        parse_command(program.removeprefix("caesura-"), rest, monkeypatch)
    elif program == "pip":
        _check_pip(rest)
    elif program in OTHERS:
        pass
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in targets for word in rest if "=" not in word), words
    else:
        raise AssertionError(f"{program} is no program that the documentation may use: {shlex.join(words)}")


def _check_code(text: str) -> None:
    """The code is Python, and what it takes from a module is there."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            getattr(importlib.import_module(node.value.id), node.attr)


def _check_pip(rest: Sequence[str]) -> None:
    assert rest[0] == "install", rest
    for word in rest[1:]:
        own = re.fullmatch(r"(caesura-lm|\.)(\[(?P<extras>.+)\])?", word)
        if own and own["extras"]:
            assert set(own["extras"].split(",")) <= PROJECT["optional-dependencies"].keys(), word
        elif word.endswith(".txt"):
            assert (ROOT / word).is_file(), word
        else:
            assert own or word.startswith("-") or re.fullmatch(r"jax(\[\w+\])?", word), word


def parse_command(name: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """What a command would do with these arguments, from its own parser."""
    module = importlib.import_module(f"experiments.{name}")
    if name == "harness":
        return _parse_harness(arguments)
    if name in OWN_PARSERS:
        return getattr(module, OWN_PARSERS[name])(arguments)
    found = []

    def command_line(settings, command, program, given, *rest):
        found.append(parsed(settings, program, given))
        return 0

    with monkeypatch.context() as patched:
        patched.setattr(module, "command_line", command_line)
        module.main(list(arguments))
    return found[0]


def _parse_harness(arguments: Sequence[str]) -> object:
    """The harness's own parser takes long to import; its flags are those that its documentation and ours name."""
    known = {"--model", "--model_args", "--tasks", "--batch_size", "--limit", "--num_fewshot", "--include_path"}
    assert {word for word in arguments if word.startswith("-")} <= known, arguments
    return arguments
