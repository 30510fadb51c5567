"""Imitation of other boundaries, or no training at all."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp

from estimators.base import AbstractObjective, ObjectiveInputs, ObjectiveOutput
from estimators.bounds import Weight, check_bounds
from estimators.equations import (
    action_log_prob,
    masked_mean,
)


class Imitation(AbstractObjective):
    r"""Cross-entropy of the router on boundaries drawn by another: $-\lambda\,\mathrm{mean}_i \log\pi(a_i)$.

    With a `Guided` router this distils the guide into the student.
    """

    weight: Weight = eqx.field(static=True, default=0.1)

    def __check_init__(self):
        check_bounds(self)

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        boundaries = inputs.boundaries
        loss = -masked_mean(action_log_prob(boundaries.logits, boundaries.actions), boundaries.decided)
        return ObjectiveOutput(self.weight * loss, {"imitation_loss": loss})


class NoObjective(AbstractObjective):
    """A loss of 0, for boundaries that follow a rule."""

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        return ObjectiveOutput(jnp.zeros((), jnp.float32), {})
