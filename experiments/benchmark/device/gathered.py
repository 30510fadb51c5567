"""Results of `experiments.bench gpu` as they come in, and the report that is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from experiments.benchmark.device.asked import Result
from experiments.benchmark.device.worker import Line
from experiments.reporting.markdown import table


@dataclass
class Part:
    """A part: the results of what is `done`, and why the others are not there, by their names. `ended`: how the part ended where
    it was not by itself."""

    name: str
    done: dict[str, Result] = field(default_factory=dict)
    without: dict[str, str] = field(default_factory=dict)
    ended: str | None = None
    begun: bool = False

    @property
    def complete(self) -> bool:
        """Whether each of its rows has a result."""
        return bool(self.done) and not self.without

    def hear(self, line: Line) -> None:
        """Take over what the part says."""
        self.begun = True
        if line["kind"] == "planned":
            self.without[line["name"]] = "not reached"
        elif line["kind"] == "done":
            self.done[line["name"]] = line["result"]
            self.without.pop(line["name"], None)
        elif line["kind"] in ("failed", "skipped", "missing"):
            self.without[line["name"]] = line["why"]


TITLES = {
    "kernels": "Kernels and fused operations against XLA",
    "generation": "Generation and scoring",
    "profile": "The costliest kernels of a training step",
    "capacities": "Choosing between sizes of the token level",
    "chunking": "Dynamic chunking",
    "PyTorch": "The same training step in PyTorch",
    "PyTorch chunking": "Dynamic chunking in PyTorch",
}

NOTES = {
    "kernels": "Values and gradients: the largest difference, relative to the largest number. Where there is a reason in the "
    "last column, both sides are XLA. *Never slower*: at least as fast, or not distinguishable.",
    "generation": "Untrained models, prompts of up to 512 bytes.",
    "capacities": "Packing the token rows of all sequences into one was removed from the library before (docs/performance.md).",
    "PyTorch": "Attention within a window is computed in blocks there too; byte by byte, boundaries are a loop of the host. "
    'Products of float32 are in TF32 (`torch.set_float32_matmul_precision("high")`), the learning rate is 0, so that the number '
    "of tokens stays.",
}


@dataclass
class Gathered:
    """Everything that is known so far."""

    parts: list[Part]
    asked: Result
    device: Result = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def part(self, name: str) -> Part:
        """The part of this name."""
        return next(part for part in self.parts if part.name == name)

    def hear(self, name: str, line: Line) -> None:
        """Take over a line of the part of this name."""
        if line["kind"] == "device":
            # PyTorch's part keeps JAX off the card.
            self.device = self.device or line["result"]
            self.part(name).begun = True
        else:
            self.part(name).hear(line)

    @property
    def against_torch(self) -> list[tuple[str, str, float]]:
        """Models, forms of PyTorch, and how many times as fast the step here is."""
        found, done = [], {part.name: part.done for part in self.parts}
        for name, other in done.get("PyTorch", {}).items():
            model, form = name.split(", ", 1)
            own = done.get(f"step of {model}", {}).get(f"{model}, as it is", {})
            if isinstance(speed := own.get("bytes/s"), float) and isinstance(theirs := other["bytes/s"], float):
                found.append((model, form, speed / theirs))
        return found

    def markdown(self) -> str:
        """The report."""
        card = self.device.get("card", "a device that has not answered yet")
        lines = [f"# On {card}", "", table(["what", ""], [(key, shown(value)) for key, value in self._about.items()])]
        if self.device and self.device.get("peak TFLOP/s in bfloat16, dense") is None:
            lines += [
                f"The peak of {card} is not known (`experiments/benchmark/cards.py`): no model FLOP utilisation.",
                "",
            ]
        for part in self.parts:
            lines += [f"## {TITLES.get(part.name, part.name.capitalize())}", "", *self._of(part)]
        if ratios := self.against_torch:
            lines += ["## Times the speed of PyTorch", ""]
            lines.append(table(["model", "PyTorch", "ratio"], [(model, form, f"{r:.2f}") for model, form, r in ratios]))
        return "\n".join([*lines, *self.notes]).rstrip() + "\n"

    @property
    def _about(self) -> Result:
        return {**self.device, **self.asked}

    def _of(self, part: Part) -> list[str]:
        lines = [f"{NOTES[part.name]}\n"] if part.name in NOTES and part.done else []
        if part.done:
            lines.append(table(*columns(part.done)))
        if part.without:
            reasons: dict[str, list[str]] = {}
            for name, why in part.without.items():
                reasons.setdefault(why, []).append(name)
            lines += ["Without a result:\n", *(f"- {'; '.join(names)}: {why}" for why, names in reasons.items()), ""]
        if part.ended is not None:
            lines += [f"{part.ended}.", ""]
        elif not part.begun:
            lines += ["Not begun yet.", ""]
        return lines


def columns(results: dict[str, Result]) -> tuple[list[str], Sequence[Sequence[str]]]:
    """A table of results: its head, without columns that are empty, and its rows."""
    names = dict.fromkeys(name for result in results.values() for name in result)
    names = [name for name in names if any(result.get(name) is not None for result in results.values())]
    return ["", *names], [[one, *(shown(result.get(name)) for name in names)] for one, result in results.items()]


def shown(value: float | int | str | bool | None) -> str:
    """A value in a table."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.3g}"
    return str(value)
