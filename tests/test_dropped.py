"""Boundaries dropped in training are counted in boundaries, level by level, and said."""

import json

import jax
import pytest

from experiments.dropped import FIRST_STEPS, DroppedBoundaries
from tests.test_run import SMALL, start, summary


def test_shares_are_of_boundaries_and_not_of_bytes():
    counted = DroppedBoundaries.of(
        [{"rate": 0.15, "overflow": 0.05}, {"rate": 0.25, "overflow": 0.0}, {"val_bpb": 2.0}], 1
    )
    assert counted.shares == pytest.approx((0.05 / 0.45,))
    assert "11.1%" in str(counted.warning)
    assert "--capacity-slack" in str(counted.warning)


def test_inner_levels_weigh_by_the_tokens_they_were_drawn_from():
    records = [
        {"rate": 0.5, "overflow": 0.0, "level1_rate": 0.3, "level1_overflow": 0.1},
        {"rate": 0.25, "overflow": 0.0, "level1_rate": 0.4, "level1_overflow": 0.0},
    ]
    counted = DroppedBoundaries.of(records, 2)
    assert counted.shares == pytest.approx((0.0, 0.05 / (0.2 + 0.1)))
    assert "0.0% and 16.7%" in str(counted.warning)


def test_half_a_per_cent_is_no_matter():
    assert DroppedBoundaries.of([{"rate": 0.199, "overflow": 0.001}], 1).warning is None
    assert DroppedBoundaries.of([{"rate": 0.198, "overflow": 0.002}], 1).warning is not None
    assert DroppedBoundaries.of([], 0).warning is None


def test_a_run_is_judged_once_there_have_been_a_few_steps():
    counted = DroppedBoundaries(1)
    for _ in range(FIRST_STEPS - 1):
        counted.add({"rate": 0.1, "overflow": 0.1})
    assert counted.early_warning is None
    counted.add({"rate": 0.1, "overflow": 0.1})
    assert counted.early_warning == counted.warning


def test_a_run_says_so_at_once_and_in_its_summary(tmp_path, capsys):
    text = tmp_path / "texts.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"{number} words and more words " * 20}) + "\n" for number in range(60))
    )
    arguments = ["--dataset", text, "--out", tmp_path / "tight", *SMALL, "--steps", "12", "--capacity-slack", "1.0"]
    # Optax relies on JAX's usual dtype promotion.
    with jax.numpy_dtype_promotion("standard"):
        assert start(*arguments) == 0
    said = capsys.readouterr().err
    assert "by step 10, " in said
    assert said.count("--capacity-slack") == 2
    assert summary(tmp_path / "tight")["dropped_fraction"] > 0.005
    assert "--capacity-slack" in summary(tmp_path / "tight")["dropped_warning"]
