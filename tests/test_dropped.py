"""Boundaries dropped in training are counted in boundaries, level by level, and said."""

import json

import jax
import pytest

from experiments.training.dropped import FIRST_STEPS, DroppedBoundaries
from tests.test_run import SMALL, start, summary


def counted(records, levels=1):
    counts = DroppedBoundaries(levels)
    for record in records:
        counts.add(record)
    return counts


def test_shares_are_of_boundaries_and_not_of_bytes():
    counts = counted([{"rate": 0.15, "overflow": 0.05}, {"rate": 0.25, "overflow": 0.0}])
    assert counts.shares == pytest.approx((0.05 / 0.45,))
    assert "11.1%" in str(counts.warning)
    assert "--capacity-slack" in str(counts.warning)


def test_inner_levels_weigh_by_the_tokens_they_were_drawn_from():
    records = [
        {"rate": 0.5, "overflow": 0.0, "level1_rate": 0.3, "level1_overflow": 0.1},
        {"rate": 0.25, "overflow": 0.0, "level1_rate": 0.4, "level1_overflow": 0.0},
    ]
    counts = counted(records, 2)
    assert counts.shares == pytest.approx((0.0, 0.05 / (0.2 + 0.1)))
    assert "0.0% and 16.7%" in str(counts.warning)
    lines = [{"step": 1, "rate": 0.2}, {"step": 2, **counts.record}, {"step": 2, "val_bpb": 2.0}]
    again = DroppedBoundaries.so_far(lines, 2)
    assert again.shares == counts.shares
    assert again.early_warning is None


def test_half_a_per_cent_is_no_matter():
    assert counted([{"rate": 0.199, "overflow": 0.001}]).warning is None
    assert counted([{"rate": 0.198, "overflow": 0.002}]).warning is not None
    assert DroppedBoundaries(0).warning is None
    assert DroppedBoundaries.so_far([], 1).warning is None


def test_a_run_is_judged_once_there_have_been_a_few_steps():
    counts = counted([{"rate": 0.1, "overflow": 0.1}] * (FIRST_STEPS - 1))
    assert counts.early_warning is None
    counts.add({"rate": 0.1, "overflow": 0.1})
    assert counts.early_warning == counts.warning


def test_a_run_says_so_at_once_and_in_its_summary(tmp_path, capsys):
    text = tmp_path / "texts.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"{number} words and more words " * 20}) + "\n" for number in range(60))
    )
    arguments = ["--dataset", text, "--out", tmp_path / "tight", *SMALL, "--steps", "12"]
    arguments += ["--capacity-slack", "1.0", "--log-every", "12"]
    # Optax relies on JAX's usual dtype promotion.
    with jax.numpy_dtype_promotion("standard"):
        assert start(*arguments) == 0
    said = capsys.readouterr().err
    assert "by step 10, " in said
    assert said.count("--capacity-slack") == 2
    assert summary(tmp_path / "tight")["dropped_fraction"] > 0.005
    assert "--capacity-slack" in summary(tmp_path / "tight")["dropped_warning"]
