"""Training steps on 8 virtual devices: the same losses as on one, and the collectives that were counted on paper.

In a process of its own, since this one has two devices.
"""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from estimators.registry import ESTIMATORS
from tests.conftest import FAST_COMPILER
from tests.mesh_steps import DIVIDED_FROM, TOKENS, VALIDATED

LONG = ("sfe:2x4x1:20", "hnet:1x8x1:20")
"""What takes 20 steps, on a mesh of other sizes."""
ASKED = [*(f"{name}:2x2x2:1" for name in sorted(ESTIMATORS.house)), *LONG]
LENGTH = 24


@pytest.fixture(scope="module")
def found():
    """What `tests.mesh_steps` found, by what it was asked."""
    environment = os.environ | {"XLA_FLAGS": FAST_COMPILER}
    command = [sys.executable, "-m", "tests.mesh_steps", *ASKED, TOKENS]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    return {one["asked"]: one for one in map(json.loads, process.stdout.splitlines())}


@pytest.mark.parametrize("asked", ASKED)
def test_losses_and_parameters_are_those_of_one_device(found, asked):
    assert found[asked]["metrics"] < 1e-5
    assert found[asked]["params"] < 1e-5


@pytest.mark.parametrize("asked", [*VALIDATED, TOKENS])
def test_a_validation_on_a_mesh_is_that_of_one_device(found, asked):
    assert found[asked]["validation"] < 1e-5


@pytest.mark.parametrize("asked", ASKED)
def test_devices_exchange_parts_of_parameters_and_gradients_and_scalars_and_nothing_else(found, asked):
    """No array with a batch axis is among them: the only others have a number for each position (centred returns), or one for
    each position and device (sums over the other sequences, of an off-policy baseline)."""
    compiled, paper = (Counter(map(tuple, found[asked][where])) for where in ("collectives", "on_paper"))
    missing = paper - compiled
    # What a router reads of a frozen byte model has no gradient, and compilers combine small sums.
    assert all(kind == "all-reduce" and size < DIVIDED_FROM for kind, _, _, size in missing) or asked.startswith(
        "entropy"
    )
    assert all(kind != "all-gather" for kind, *_ in missing)
    for kind, _, group, size in compiled - paper:
        by_position = asked.startswith("sfe") and size in (LENGTH, LENGTH * group)
        assert size == 1 or by_position, (kind, group, size)
