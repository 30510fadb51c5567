"""One name for each number, and a page that lists them."""

import json
from pathlib import Path

import pytest

from experiments.comparison.comparison import MEASURED
from experiments.comparison.finished import read_tables
from experiments.reporting.metrics import SECTIONS, documentation, metric_of

DOCS = Path(__file__).parent.parent / "docs"
NO_NUMBERS = {"estimator", "dataset", "model", "dropped_warning", "seeds", "missed", "runs", "name", "published"}


def test_the_page_lists_the_metrics():
    assert (DOCS / "metrics.md").read_text() == documentation()


def test_every_name_stands_for_one_number():
    names = [metric.name for metrics in SECTIONS.values() for metric in metrics]
    assert len(set(names)) == len(names)
    assert all(metric_of(name) is not None for name in MEASURED)


@pytest.mark.parametrize(
    ("name", "general"),
    [
        ("val_level2_rate", "val_level{n}_rate"),
        ("level1_policy_loss", "policy_loss"),
        ("val_spacelike_auc", "val_{class}_auc"),
        ("level3_target_rate", "level{n}_target_rate"),
    ],
)
def test_names_of_levels_and_classes_are_known(name, general):
    metric = metric_of(name)
    assert metric is not None
    assert metric.name == general
    assert metric_of(f"old_{name}") is None


@pytest.mark.parametrize("path", sorted((DOCS / "measured").glob("*.json")), ids=lambda path: path.stem)
def test_measured_tables_have_these_names_and_are_read(path):
    methods = json.loads(path.read_text())["methods"]
    names = set().union(*methods, *(run["summary"] for method in methods for run in method["runs"]))
    assert [name for name in sorted(names - NO_NUMBERS) if metric_of(name) is None] == []
    assert {name for method in methods for run in method["runs"] for point in run["curve"] for name in point} == {
        *("flops", "bytes", "val_bpb")
    }
    assert read_tables([path], {}) == {}
