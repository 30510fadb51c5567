"""The output files of a comparison: `table.md`, `table.json`, `curves.png` and `report.html`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from experiments.comparison.finished import FinishedRun, Runs, portable
from experiments.comparison.intervals import CONFIDENCE, Difference, paired_difference
from experiments.comparison.page import Table, curves_figure, page, shaded_texts
from experiments.comparison.pairs import (
    PAIR_COLUMNS,
    Pair,
    compare_pairs,
    difference_json,
    pair_cells,
    pair_json,
    pair_remarks,
    text_of,
)
from experiments.comparison.plan import Plan
from experiments.comparison.study import Variant
from experiments.reporting.display import Display
from experiments.reporting.markdown import table as markdown_table
from experiments.reporting.pictures import picture
from experiments.training.data import load_split
from experiments.training.dropped import TOLERATED
from experiments.training.run_dir import json_text
from unet.files.saving import write_atomically

RATE_TOLERANCE = 0.1
"""Relative deviation from the target rate above which a method is flagged: more tokens give better bits per byte."""
OF_THE_TEXT = ("dataset", "data", "evaluation", "length", "batch", "total_steps")
"""What settles which text a run is trained and evaluated on."""


@dataclass(frozen=True)
class MeanAndError:
    """A mean over `n` seeds and its standard error, which is NaN for one seed."""

    mean: float
    error: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> MeanAndError:
        """From one value per seed. The error is sd / √n, with the sample standard deviation."""
        error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
        return cls(float(np.mean(values)), error, len(values))

    def text(self, digits: int = 3, unit: float = 1.0) -> str:
        """The text for a table, in multiples of `unit`; a dash if the mean is undefined."""
        if math.isnan(self.mean):
            return "–"
        error = "" if math.isnan(self.error) else f" ± {self.error / unit:.{digits}f}"
        return f"{self.mean / unit:.{digits}f}{error}"


@dataclass(frozen=True)
class MethodResult:
    """Results of one variant over its seeds.

    `numbers`: the values of `MEASURED` by name. `gain`: the reference's bits per byte minus its own, paired by seed.
    `val_rates`, `target_rates`: measured and target rates of all levels, the outermost first. `missed`: whether a rate
    differs from its target by more than `RATE_TOLERANCE`. A target under constraints is one of the bytes that they leave free.
    """

    name: str
    seeds: tuple[int, ...]
    numbers: Mapping[str, MeanAndError]
    gain: Difference
    val_rates: tuple[MeanAndError, ...]
    target_rates: tuple[float, ...]
    missed: bool
    parameters: int

    def json(self) -> dict[str, object]:
        """The entry in `table.json`, without runs."""
        own = {name: value for name, value in asdict(self).items() if name != "numbers"}
        return {**own, **asdict(self)["numbers"], "gain": difference_json(self.gain)}


MEASURED = (
    *("val_bpb", "val_bpb_greedy", "val_bpb_as_trained", "val_whitespace_auc", "val_whitespace_f1"),
    *("val_whitespace_sampled_f1", "flops_per_byte", "layer_flops_per_byte", "bytes_per_second", "seconds"),
    *("dropped_fraction", "val_free_rate"),
)
"""Entries of `summary.json` that are averaged over seeds."""

COLUMNS: dict[str, str] = {
    "name": "variant",
    "val_bpb": "bits per byte",
    "gain": f"below `{{reference}}`, {CONFIDENCE:.0%} interval",
    "val_rates": "rate",
    "val_whitespace_auc": "AUC of p",
    "val_whitespace_f1": "F1, p > 0.5",
    "val_whitespace_sampled_f1": "F1, sampled",
    "flops_per_byte": "MFLOP/byte",
    "layer_flops_per_byte": "… by layers",
    "bytes_per_second": "kB/s",
    "seconds": "seconds",
    "dropped_fraction": "dropped, %",
    "parameters": "parameters",
    "seeds": "seeds",
}


def columns(reference: str) -> dict[str, str]:
    """The headings of the table of variants, by column name."""
    return {name: heading.format(reference=reference) for name, heading in COLUMNS.items()}


def write_comparison(plan: Plan, runs: Runs, display: Display) -> list[MethodResult]:
    """Write all output files of the finished `runs` and print the tables. Returns the results of the variants."""
    out = plan.out
    curves = {name: {run.seed: run.curve for run in own} for name, own in runs.items()}
    methods = method_results(runs, plan.reference)
    compared = compare_pairs(plan.pairs, {name: bits_per_byte(own) for name, own in runs.items()}, curves)
    gains = [method.gain for method in methods]
    notes = [*remarks(methods), *joined_remarks(plan, runs), *pair_remarks(compared, gains)]
    tables = [Table("", columns(plan.reference), [cells(method) for method in methods])]
    if published := published_table(plan.study.variants, runs):
        tables.append(published)
    if compared:
        tables.append(Table("Pairs", PAIR_COLUMNS, [pair_cells(pair) for pair in compared]))
    texts_of_tables = [markdown(table.columns, table.rows) for table in tables]
    write_atomically(out / "table.json", json_text(table_json(plan, methods, compared, runs, notes)))
    write_atomically(out / "table.md", "\n".join([*texts_of_tables, "\n\n".join(notes)]) + "\n")
    figure = curves_figure(curves, plan.reference)
    write_atomically(out / "curves.png", picture(figure))
    common = next(iter(plan.requested.values()), next(iter(runs.values()))[0].config)
    split = load_split(common)
    here = {name: [run for run in own if run.folder is not None] for name, own in runs.items()}
    texts = shaded_texts({name: own[0] for name, own in here.items() if own}, split)
    write_atomically(out / "report.html", page(plan.study.head, common, tables, notes, figure, texts, plan.reference))
    for text in (*texts_of_tables, *split.notes, *notes, f"see {out / 'report.html'}"):
        display.note(text)
    return methods


def table_json(
    plan: Plan, methods: Sequence[MethodResult], pairs: Sequence[Pair], runs: Runs, notes: Sequence[str]
) -> dict[str, object]:
    """The content of `table.json`: the tables in full, and the settings, summary and curve of each run."""
    published = {variant.name: dict(variant.published) for variant in plan.study.variants}
    entries = [
        {
            **method.json(),
            "published": published.get(method.name, {}),
            "runs": [run.json() for run in runs[method.name]],
        }
        for method in methods
    ]
    return {
        "reference": plan.reference,
        "confidence": CONFIDENCE,
        "methods": entries,
        "pairs": [pair_json(pair) for pair in pairs],
        "notes": list(notes),
    }


def published_table(variants: Sequence[Variant], runs: Runs) -> Table | None:
    """Numbers of others beside those of the finished runs, by metric; None where the study has none."""
    names = list(dict.fromkeys(name for variant in variants for name in variant.published))
    if not names:
        return None
    headings = {"name": "variant"}
    for name in names:
        headings |= {name: f"`{name}`", f"{name} published": "published"}
    rows = []
    for variant in variants:
        if own := runs.get(variant.name):
            row = {"name": f"`{variant.name}`"}
            for name in names:
                row[name] = MeanAndError.of([run.value(name) for run in own]).text(3)
                row[f"{name} published"] = f"{variant.published[name]:g}" if name in variant.published else "–"
            rows.append(row)
    return Table("Published numbers", headings, rows) if rows else None


def joined_remarks(plan: Plan, runs: Runs) -> list[str]:
    """A note for each variant made of runs from elsewhere, on other data or of another length than the runs made here."""
    first = portable(next(iter(plan.requested.values()), next(iter(runs.values()))[0].config))
    notes = []
    for variant in plan.study.variants:
        for run in runs.get(variant.name, ()) if variant.runs else ():
            own = portable(run.config)
            if changed := [name for name in OF_THE_TEXT if getattr(own, name) != getattr(first, name)]:
                notes.append(
                    f"{variant.name} was made elsewhere with other settings for {', '.join(changed)}: its bits per byte are "
                    "those of another text, or of another training text."
                )
                break
    return notes


def bits_per_byte(runs: Sequence[FinishedRun]) -> dict[int, float]:
    """Held-out bits per byte by seed."""
    return {run.seed: run.value("val_bpb") for run in runs}


def _of_free(rates: Sequence[MeanAndError], runs: Sequence[FinishedRun]) -> list[MeanAndError]:
    """The rates that targets ask for: under constraints those of free bytes. Of constrained levels inside the first they are not
    known (NaN)."""
    config, unknown = runs[0].config, MeanAndError.of([math.nan])
    first = MeanAndError.of([run.value("val_free_rate") for run in runs]) if config.constrain else rates[0]
    return [first, *(unknown if config.inner_constrain else rate for rate in rates[1:])]


def method_results(runs: Runs, reference: str) -> list[MethodResult]:
    """The results of each variant, in the order of `runs`; gains are relative to the `reference`."""
    of_reference = bits_per_byte(runs.get(reference, ()))
    methods = []
    for name, own in runs.items():

        def measured(key: str, own: Sequence[FinishedRun] = own) -> MeanAndError:
            return MeanAndError.of([run.value(key) for run in own])

        inner = sorted(key.removesuffix("target_rate") for key in own[0].summary if key.endswith("_target_rate"))
        rates = tuple(measured(f"val_{level}rate") for level in ("", *inner))
        targets = tuple(own[0].value(f"{level}target_rate") for level in ("", *inner))
        methods.append(
            MethodResult(
                name=name,
                seeds=tuple(run.seed for run in own),
                numbers={key: measured(key) for key in MEASURED},
                gain=paired_difference({} if name == reference else of_reference, bits_per_byte(own)),
                val_rates=rates,
                target_rates=targets,
                missed=any(
                    abs(rate.mean / target - 1) > RATE_TOLERANCE
                    for rate, target in zip(_of_free(rates, own), targets, strict=True)
                ),
                parameters=int(own[0].value("parameters")),
            )
        )
    return methods


def cells(method: MethodResult) -> dict[str, str]:
    """The table cells of one variant, by column."""
    numbers = method.numbers
    return {
        "name": f"`{method.name}`",
        "val_bpb": numbers["val_bpb"].text(4),
        "gain": text_of(method.gain),
        "val_rates": _rates(method) + (" †" if method.missed else ""),
        **{name: numbers[name].text(3) for name in MEASURED if name.startswith("val_whitespace")},
        "flops_per_byte": f"{numbers['flops_per_byte'].mean / 1e6:.2f}",
        "layer_flops_per_byte": f"{numbers['layer_flops_per_byte'].mean / 1e6:.2f}",
        "bytes_per_second": f"{numbers['bytes_per_second'].mean / 1e3:.1f}",
        "seconds": f"{numbers['seconds'].mean:.0f}",
        "dropped_fraction": numbers["dropped_fraction"].text(3, 0.01),
        "parameters": f"{method.parameters:,}",
        "seeds": ", ".join(map(str, method.seeds)),
    }


def markdown(headings: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> str:
    """A table in Markdown. `headings`: by column name."""
    return markdown_table([*headings.values()], [[row[name] for name in headings] for row in rows])


def _rates(method: MethodResult) -> str:
    """The rates of all levels, and under constraints that of the free bytes."""
    free = method.numbers["val_free_rate"]
    of_free = "" if math.isnan(free.mean) else f" ({free.text(3)} of free bytes)"
    first, *inner = (rate.text(3) for rate in method.val_rates)
    return " / ".join([first + of_free, *inner])


def remarks(methods: Sequence[MethodResult]) -> list[str]:
    """Notes for readers of the table."""
    notes = [
        "Bits per byte of held-out text with sampled boundaries. ± is the standard error of the mean over the seeds in the row. "
        "Only paired differences over seeds can tell whether two methods differ."
    ]
    missed = [method for method in methods if method.missed]
    if missed:
        names = ", ".join(
            f"{method.name} {_rates(method)} for {' / '.join(f'{target:g}' for target in method.target_rates)}"
            for method in missed
        )
        notes.append(
            f"† Missed its target rate by more than {RATE_TOLERANCE:.0%} ({names}). More tokens give better bits per byte, fewer "
            "give worse. --target.control adjusts an estimator's own target until the rate is the target rate; larger is faster."
        )
    if overfull := [method for method in methods if method.numbers["dropped_fraction"].mean > TOLERATED]:
        names = ", ".join(f"{method.name} {method.numbers['dropped_fraction'].mean:.1%}" for method in overfull)
        notes.append(f"Too many boundaries were dropped in training ({names}): set a larger --capacity-slack.")
    for method in methods:
        own, greedy, trained = (method.numbers[f"val_bpb{kind}"] for kind in ("", "_greedy", "_as_trained"))
        if not math.isnan(trained.mean):
            notes.append(
                f"{method.name} was trained on boundaries that another router drew: {trained.text(4)} bits per byte with "
                f"those, {own.text(4)} with its own, sampled, and {greedy.text(4)} with its own, greedy."
            )
    return notes
