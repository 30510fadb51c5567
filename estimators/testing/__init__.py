"""The contract of estimators, for anybody's tests: `check_estimator(my_estimator)`.

An estimator keeps its contract inside a whole model, so this package is the one part of `estimators` that uses `unet`; nothing
of the library imports it.
"""

from estimators.testing.chunker import check_chunker
from estimators.testing.constraint import check_constraints
from estimators.testing.estimator import (
    CHECKS,
    check_batch,
    check_boundaries,
    check_capacity,
    check_causality,
    check_causality_of_gradients,
    check_chunking,
    check_constraint,
    check_decoding,
    check_estimator,
    check_extremes,
    check_gradients,
    check_packing,
    check_saving,
    check_shapes,
)
from estimators.testing.reduction import check_reduction
from estimators.testing.subject import ContractError, Setup

__all__ = [
    "CHECKS",
    "ContractError",
    "Setup",
    "check_batch",
    "check_boundaries",
    "check_capacity",
    "check_causality",
    "check_causality_of_gradients",
    "check_chunker",
    "check_chunking",
    "check_constraint",
    "check_constraints",
    "check_decoding",
    "check_estimator",
    "check_extremes",
    "check_gradients",
    "check_packing",
    "check_reduction",
    "check_saving",
    "check_shapes",
]
