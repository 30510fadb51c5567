"""One contract that every registered estimator keeps: the public one, which is anybody's."""

from typing import get_args

import pytest

from estimators.testing import CHECKS, Setup
from experiments.config.registry import REGISTRY
from experiments.config.settings import EstimatorName
from tests.compositions import registered


@pytest.fixture(scope="module", params=sorted(REGISTRY))
def model(request):
    return registered(request.param)


def test_every_name_of_the_command_line_is_registered():
    assert set(get_args(EstimatorName)) == set(REGISTRY)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_estimator_keeps_the_contract(model, check):
    check(model, Setup())
