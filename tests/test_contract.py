"""One contract that every registered estimator keeps, with constraints and without: the public one, which is anybody's."""

import pytest

from estimators.constraints import MaxLength, MinLength, WholeCharacters
from estimators.registry import ESTIMATORS
from estimators.testing import CHECKS, Setup, check_decoding, check_gradients
from tests.compositions import registered, under

ALL = (WholeCharacters(), MaxLength(5), MinLength(2))


@pytest.fixture(scope="module", params=sorted(ESTIMATORS.house))
def model(request):
    return registered(request.param)


@pytest.fixture(scope="module")
def constrained():
    return under(registered("sfe"), ALL)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_estimator_keeps_the_contract(model, check):
    check(model, Setup())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_constrained_estimator_keeps_the_contract(constrained, check):
    check(constrained, Setup())


@pytest.mark.parametrize("check", [check_decoding, check_gradients], ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ["gumbel", "hnet"])
def test_gradients_pass_constrained_chunkers_and_steps_give_what_one_pass_gives(name, check):
    check(under(registered(name), ALL), Setup())
