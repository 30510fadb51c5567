"""The rate that an objective aims at."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from estimators.base import ObjectiveInputs


def aimed_rate(built_for: float, inputs: ObjectiveInputs) -> Float[Array, ""]:
    """The current target rate: that of the inputs if given, else the one that the objective was built for."""
    return jnp.asarray(built_for, jnp.float32) if inputs.target_rate is None else inputs.target_rate
