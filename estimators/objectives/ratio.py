"""H-Net's ratio loss.

"H-Net" is Hwang, Wang and Gu, "Dynamic chunking for end-to-end hierarchical sequence modeling".
"""

from __future__ import annotations

import equinox as eqx

from estimators.base import AbstractObjective, ObjectiveInputs, ObjectiveOutput
from estimators.bounds import Rate, Weight, check_bounds
from estimators.equations import (
    ratio_loss,
)
from estimators.objectives.rate import aimed_rate


class RatioObjective(AbstractObjective):
    r"""H-Net's ratio loss with $1/\pi_{target}$ bytes per chunk, times `weight` (H-Net eq. 10 and section 3.1).

    It trains the rate only; all other gradients reach the router through the chunker.
    """

    target_rate: Rate = eqx.field(static=True)
    weight: Weight = eqx.field(static=True, default=0.03)

    def __check_init__(self):
        check_bounds(self)

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        boundaries = inputs.boundaries
        chunk_size = 1.0 / aimed_rate(self.target_rate, inputs)
        valid = boundaries.decided | boundaries.starts
        loss = ratio_loss(boundaries.actions, boundaries.probs, chunk_size, valid)
        return ObjectiveOutput(self.weight * loss, {"ratio_loss": loss})
