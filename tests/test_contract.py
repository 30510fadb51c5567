"""One contract that every registered estimator keeps: the public one, which is anybody's."""

import pytest

from estimators.registry import ESTIMATORS
from estimators.testing import CHECKS, Setup
from tests.compositions import registered


@pytest.fixture(scope="module", params=sorted(ESTIMATORS.house))
def model(request):
    return registered(request.param)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_estimator_keeps_the_contract(model, check):
    check(model, Setup())
