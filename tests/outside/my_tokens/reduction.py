"""A variance reduction: returns in units of their own spread.

python -m experiments.run --sfe.reductions early-exit discount my_tokens.reduction:Standardise --standardise.floor 0.1
"""

import equinox as eqx
import jax.numpy as jnp

from estimators import AbstractReduction, Credit, ObjectiveInputs
from estimators.equations import batch_centred
from estimators.sharding import batch_sum


class Standardise(AbstractReduction):
    """Returns minus the batch mean at the same position, divided by the standard deviation there. Biased."""

    floor: float = eqx.field(static=True, default=1e-3)
    """The smallest standard deviation to divide by."""

    @property
    def needs_early_exit(self) -> bool:
        return False

    def __call__(self, credit: Credit, inputs: ObjectiveInputs) -> Credit:
        centred = batch_centred(credit.summed(inputs), inputs.mask, leave_one_out=False)
        # Of the whole batch, of which a device may have a part.
        squares, count = batch_sum((jnp.sum(centred**2, axis=0), jnp.sum(inputs.mask, axis=0)))
        variance = squares / jnp.maximum(count, 1)
        return credit.compared("Standardise", centred / jnp.maximum(jnp.sqrt(variance), self.floor))
