"""A variance reduction: returns in units of their own spread.

python -m experiments.run --sfe.reductions early-exit discount my_tokens.reduction:Standardise --standardise.floor 0.1
"""

import equinox as eqx
import jax.numpy as jnp

from estimators import AbstractReduction, Credit, ObjectiveInputs
from estimators.equations import masked_mean


class Standardise(AbstractReduction):
    """Returns minus the batch mean, divided by the batch standard deviation. Biased: both depend on the actions."""

    floor: float = eqx.field(static=True, default=1e-3)
    """The smallest standard deviation to divide by."""

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, credit: Credit, inputs: ObjectiveInputs) -> Credit:
        returns = credit.summed(inputs)
        centred = returns - masked_mean(returns, inputs.mask)
        spread = jnp.sqrt(masked_mean(centred**2, inputs.mask))
        return credit.compared("Standardise", centred / jnp.maximum(spread, self.floor))
