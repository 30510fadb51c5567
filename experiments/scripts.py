"""The commands as programs of their own: `caesura-run` is `python -m experiments.run`, and so on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NoReturn

from experiments.launch import begin, program


def _script(name: str) -> Callable[[], NoReturn]:
    def start() -> NoReturn:
        # Before the command imports anything, as `python -m` has it.
        begin()
        program(importlib.import_module(f"experiments.{name}").main)

    return start


bench = _script("bench")
compare = _script("compare")
evaluate = _script("evaluate")
explore = _script("explore")
export = _script("export")
generate = _script("generate")
harness = _script("harness")
lab = _script("lab")
run = _script("run")
runs = _script("runs")
shade = _script("shade")
words = _script("words")
