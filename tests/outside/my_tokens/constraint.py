"""A constraint: tokens end where lines end, and hold numbers together.

python -m experiments.run --constrain characters my_tokens.constraint:Numbers --numbers.longest 4
"""

import equinox as eqx
import jax.numpy as jnp

from estimators import AbstractConstraint, Layout, Limits
from estimators.equations import NEVER


class Numbers(AbstractConstraint):
    """No boundary after a digit, unless the chunk has as many bytes as `longest`; always one after a line feed."""

    longest: int = eqx.field(static=True, default=8)
    """The most bytes of a chunk that ends with a digit."""

    def limits(self, layout: Layout) -> Limits:
        digit = (layout.bytes >= 48) & (layout.bytes <= 57)
        least = jnp.where(digit, self.longest, 1)
        most = jnp.where(layout.bytes == 10, 1, NEVER)
        return Limits(least, most)
