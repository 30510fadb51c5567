"""A binomial prior on the number of boundaries.

"DPT" is Nawrot et al., "Efficient transformers with dynamic token pooling".
"""

from __future__ import annotations

import equinox as eqx

from estimators.base import AbstractObjective, ObjectiveInputs, ObjectiveOutput
from estimators.bounds import Rate, Weight, check_bounds
from estimators.equations import (
    binomial_prior_loss,
)
from estimators.objectives.rate import aimed_rate


class BinomialPrior(AbstractObjective):
    r"""Negative log-probability of the number of boundaries under $\mathrm{Binomial}(n, \pi_{target})$, per position (DPT).

    Its gradient passes through `Boundaries.relaxed`. Raises `ValueError` for boundaries without it.
    """

    target_rate: Rate = eqx.field(static=True)
    weight: Weight = eqx.field(static=True, default=1.0)

    def __check_init__(self):
        check_bounds(self)

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        boundaries = inputs.boundaries
        if boundaries.relaxed is None:
            raise ValueError(
                "BinomialPrior needs boundaries with `relaxed` values: use a router that sets them, such as MLPRouter"
            )
        loss = binomial_prior_loss(boundaries.relaxed, aimed_rate(self.target_rate, inputs), boundaries.decided)
        return ObjectiveOutput(self.weight * loss, {"prior_loss": loss})
