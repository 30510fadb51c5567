"""The report of a run: `report.html`, a self-contained page, and `boundaries.png`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.config.settings import RunConfig
from experiments.reporting.pictures import boundaries_picture, inline_svg
from experiments.reporting.plots import curves_figure, tokens_figure
from experiments.reporting.shading import readable
from experiments.reporting.summary import Summary, target_rates
from experiments.terminal import escaped
from unet.files.saving import write_atomically
from unet.losses import level_prefix
from unet.shading.characters import Character
from unet.shading.html import fragment

SHOWN = 6
"""Texts that the report shows of those that its plots are of."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #777; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.quiet, figcaption { color: var(--quiet); margin-top: .2rem; }
table { border-collapse: collapse; }
td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); }
td + td { font-variant-numeric: tabular-nums; }
svg.picture { width: 100%; height: auto; }
.wide { overflow-x: auto; width: min(100vw - 2rem, 73rem); margin-left: 50%; transform: translateX(-50%); }
.wide table { font-size: .84rem; line-height: 1.35; margin: 0 auto; } .wide th { text-align: left; vertical-align: bottom; }
.wide th, .wide td { padding: .25rem .7rem .25rem 0; } .wide .whole { white-space: nowrap; }
td.quiet { color: var(--quiet); }
"""


def write_report(folder: Path, config: RunConfig, summary: Summary, shaded: Sequence[Sequence[Character]]) -> None:
    """Write both files to `folder`, whose `metrics.jsonl` and `config.json` are read. `shaded`: held-out text, some of
    which is shown."""
    shown = [readable(text) for text in shaded[:SHOWN]]
    write_atomically(folder / "boundaries.png", boundaries_picture(shown))
    write_atomically(folder / "report.html", report_page(folder, config, summary, shaded))


def report_page(folder: Path, config: RunConfig, summary: Summary, shaded: Sequence[Sequence[Character]]) -> str:
    """The content of `report.html`: a table of results, shaded held-out text, curves and settings."""
    title = f"{config.estimator} on {config.dataset}"
    curves = inline_svg(
        curves_figure(folder, config),
        "Bits per byte, boundary rate and agreement with white space over training bytes",
    )
    shown = [readable(text) for text in shaded[:SHOWN]]
    texts = fragment(shown, [f"Text {number}" for number in range(1, len(shown) + 1)])
    tokens = inline_svg(tokens_figure(shaded), "Lengths of tokens, bits and ends of tokens by class of byte")
    settings = html.escape((folder / "config.json").read_text())
    return html_page(
        title,
        f"""<p class="quiet">{_subtitle(config, summary)}</p>
<table>{"".join(_result_rows(config, summary))}</table>
<h2>Held-out text</h2>
<p class="quiet">▪ is the start of a document.</p>
{texts}
<h2>Curves</h2>
{curves}
<h2>Tokens</h2>
{tokens}
<p class="quiet">Of {sum(map(len, shaded)):,} characters of held-out text, with sampled boundaries; below each class its share of
the bytes.</p>
<h2>Settings</h2>
<details><summary>config.json</summary><pre>{settings}</pre></details>""",
    )


def html_page(title: str, body: str) -> str:
    """A self-contained HTML page with this title and body."""
    # The name of a data set may be that of a file that is no UTF-8.
    title = escaped(title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{body}
</body></html>
"""


def _subtitle(config: RunConfig, summary: Summary) -> str:
    return html.escape(
        f"{config.model}, {summary['parameters']:,} parameters, {config.length} bytes x {config.batch} sequences a step, "
        f"{_number(summary['bytes'], 1e6, 2)} MB of training text, seed {config.seed}"
    )


def _result_rows(config: RunConfig, summary: Summary) -> Iterable[str]:
    rows = [
        (
            "Held-out bits per byte ± standard error over documents",
            f"{_number(summary['val_bpb'])} ± {_number(summary['val_bpb_error'])}",
        ),
        ("… of the early exit", _number(summary["val_early_bpb"])),
        *(
            (f"… with {boundaries}", _number(summary[name]))
            for name, boundaries in (
                ("val_bpb_greedy", "its own boundaries, greedy instead of sampled"),
                ("val_bpb_as_trained", "the boundaries it is trained on"),
            )
            if summary.get(name) is not None
        ),
        (
            "Boundary rate, target",
            f"{_number(summary['val_rate'], digits=3)}, {_target(config, summary['target_rate'])}",
        ),
        *(
            [("… of the bytes that constraints leave free", _number(summary["val_free_rate"], digits=3))]
            if config.constrain
            else []
        ),
        *(
            (
                f"… at inner level {level}, target",
                f"{_number(summary[f'val_{level_prefix(level)}rate'], digits=3)}, {_target(config, target)}",
            )
            for level, target in enumerate(target_rates(config))
            if level
        ),
        ("White space: AUC of p", _number(summary["val_whitespace_auc"])),
        (
            "White space: F1 of boundaries with p > 0.5, of sampled ones",
            f"{_number(summary['val_whitespace_f1'], digits=3)}, {_number(summary['val_whitespace_sampled_f1'], digits=3)}",
        ),
        (
            "Spacelike: F1 of boundaries with p > 0.5, of sampled ones",
            f"{_number(summary['val_spacelike_f1'], digits=3)}, {_number(summary['val_spacelike_sampled_f1'], digits=3)}",
        ),
        ("Policy entropy, nats per decision", _number(summary["val_policy_entropy"])),
        ("Fraction of boundaries dropped in training", _number(summary["dropped_fraction"], digits=5)),
        ("Epochs", _number(summary["epochs"], digits=2)),
        ("Fraction of the training text that can occur in batches", _number(summary["shown_fraction"], digits=3)),
        ("Training speed, kB/s", _number(summary["bytes_per_second"], 1e3, 1)),
        ("Training time, s", _number(summary["seconds"], digits=0)),
    ]
    return (f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows)


def _target(config: RunConfig, rate: float | int | str | None) -> str:
    if rate is None:
        return "that of the tokenizer" if config.reads_tokens else "none, since there are no tokens"
    return f"{rate:g}"


def _number(value: float | int | str | None, unit: float = 1.0, digits: int = 4) -> str:
    return f"{value / unit:.{digits}f}" if isinstance(value, int | float) else "–"
