"""The rate that an estimator aims at while it trains."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from experiments.config.settings import RunConfig

MOST = 1.5
"""Log-odds, at most, that the controller adds: an estimator that it cannot bring to the rate must not be pushed ever further,
or it would overshoot for as long once it moves."""


class TargetState(eqx.Module):
    """Steps taken, and the log-odds that the controller has added to the rate asked for."""

    step: Int[Array, ""]
    offset: Float[Array, ""]

    def __init__(self):
        self.step, self.offset = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)


class TargetSchedule(eqx.Module):
    r"""The rate asked for at each step, and what an estimator has to aim at so that it comes out.

    Asked: a straight line from `start` to `rate` over `steps` steps, then `rate`. Aimed at:
    $\sigma(\mathrm{logit}(\pi_t) + o_t)$, where a `control` above 0 moves the offset by
    $o_{t+1} = o_t + c\,(1 - r_t/\pi_t)$, within $\pm 1.5$, for the rate r of the boundaries drawn: an estimator that
    draws too many is told to aim lower, slowly, until it draws as many as were asked for.
    """

    start: float = eqx.field(static=True)
    rate: float = eqx.field(static=True)
    steps: int = eqx.field(static=True)
    control: float = eqx.field(static=True)

    @classmethod
    def of(cls, config: RunConfig) -> TargetSchedule:
        """What a run asks for."""
        target = config.target
        start = config.rate if target.start is None else target.start
        return cls(start, config.rate, max(1, round(target.until * config.total_steps)), target.control)

    @property
    def highest(self) -> float:
        """The highest rate ever asked for, which buffers must hold."""
        return max(self.start, self.rate)

    def asked(self, state: TargetState) -> Float[Array, ""]:
        """The rate wanted at this step."""
        share = jnp.minimum(state.step.astype(jnp.float32) / self.steps, 1.0)
        return self.start + share * (self.rate - self.start)

    def at(self, step: int) -> float:
        """The rate wanted at this step, as a number."""
        return self.start + min(step / self.steps, 1.0) * (self.rate - self.start)

    def target(self, state: TargetState) -> Float[Array, ""]:
        """What the estimator aims at."""
        asked = self.asked(state)
        if self.control == 0.0:
            return asked
        return jax.nn.sigmoid(jnp.log(asked) - jnp.log1p(-asked) + state.offset)

    def moved(self, state: TargetState, rate: Float[Array, ""]) -> TargetState:
        """The state after a step in which boundaries were drawn at `rate`."""
        offset = state.offset
        if self.control:
            offset = jnp.clip(offset + self.control * (1.0 - rate / self.asked(state)), -MOST, MOST)
        return eqx.tree_at(lambda s: (s.step, s.offset), state, (state.step + 1, offset))
