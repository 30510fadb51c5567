"""Boundaries where a small language model is unsure of what comes: BLT's patching rules.

"BLT" is Pagnoni et al., "Byte latent transformer: patches scale better than tokens".
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from estimators.base import (
    AbstractChunker,
    AbstractEstimator,
    AbstractObjective,
    AbstractRouter,
    Boundaries,
    Draw,
    Frozen,
    Layout,
)
from estimators.equations import entropy
from estimators.fixed import certain
from estimators.objectives import NoObjective


@runtime_checkable
class HasLogits(Protocol):
    """A prediction of the next byte at every row."""

    @property
    def logits(self) -> Float[Array, "batch length vocab"]: ...


@runtime_checkable
class ByteModel(Protocol):
    """A causal language model over bytes, such as `unet.UNet`."""

    def __call__(
        self,
        bytes: Int[Array, "batch length"],
        *,
        segments: Int[Array, "batch length"] | None = None,
        mask: Bool[Array, "batch length"] | None = None,
    ) -> HasLogits: ...


def surprise(model: ByteModel, layout: Layout) -> Float[Array, "batch length"]:
    """$H_{i-1}$: the entropy in nats of the prediction of byte i, made at row i - 1; infinite where a document starts."""
    prediction = model(layout.bytes, segments=layout.segments, mask=layout.mask)
    before = jnp.pad(entropy(prediction.logits)[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(layout.starts, jnp.inf, before)


def over_threshold(
    surprise: Float[Array, "batch length"], threshold: float | Float[Array, ""]
) -> Bool[Array, "batch length"]:
    r"""$H_{i-1} > \theta_g$: the global rule (BLT)."""
    return surprise > threshold


def over_both(
    surprise: Float[Array, "batch length"],
    starts: Bool[Array, "batch length"],
    threshold: float | Float[Array, ""],
    increase: float | Float[Array, ""],
) -> Bool[Array, "batch length"]:
    r"""$H_{i-1} > \theta_g$ and $H_{i-1} - H_{i-2} > \theta_r$, and no boundary just before: the combined rule (BLT).

    Of several candidates in a row every second one is taken, the first included. The row after a document's start has no
    rise to go by, and a boundary just before it.
    """
    before = jnp.pad(surprise[:, :-1], ((0, 0), (1, 0)), constant_values=jnp.inf)
    candidate = (surprise > threshold) & (surprise - before > increase) | starts
    place = jnp.arange(surprise.shape[1])[None, :]
    # The last row that is no candidate, or the start of this document: candidates are counted from there.
    since = jnp.where(~candidate, place, jnp.where(starts, place - 1, -1))
    run = place - jax.lax.cummax(since, axis=1)
    return candidate & (run % 2 == 1)


class EntropyRouter(AbstractRouter):
    """Boundaries where a frozen byte model's entropy passes a threshold; with an `increase`, BLT's combined rule.

    `target_rate` is what the thresholds were chosen to meet, by `find_threshold` on training text.
    """

    model: Frozen[ByteModel]
    threshold: Frozen[Float[Array, ""]]
    increase: Frozen[Float[Array, ""]] | None
    target_rate: float = eqx.field(static=True)

    def __init__(self, model: ByteModel, threshold: float, increase: float | None = None, *, target_rate: float):
        """Thresholds are entropies in nats."""
        self.model = Frozen(model)
        self.threshold = Frozen(jnp.asarray(threshold, jnp.float32))
        self.increase = None if increase is None else Frozen(jnp.asarray(increase, jnp.float32))
        self.target_rate = target_rate

    @property
    def rate(self) -> float | None:
        return self.target_rate

    def __call__(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Boundaries:
        if draw.actions is not None:
            return certain(draw.actions, layout)
        unsure = surprise(self.model(), layout)
        if self.increase is None:
            return certain(over_threshold(unsure, self.threshold()), layout)
        return certain(over_both(unsure, layout.starts, self.threshold(), self.increase()), layout)


class Entropy(AbstractEstimator):
    """Tokens begin where the next byte was hard to foresee (BLT)."""

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(self, router: EntropyRouter, *, chunker: AbstractChunker):
        """`router` holds the byte model and the thresholds."""
        self.router, self.chunker, self.objective = router, chunker, NoObjective()


def find_threshold(surprise: np.ndarray, starts: np.ndarray, rate: float, increase: float | None = None) -> float:
    """The threshold at which the rule draws boundaries at `rate` on the text that `surprise` was measured on.

    Both arrays are `batch length`, without padding. Found by bisection to within a millionth of a nat; the rate moves in
    steps, and the threshold returned is the lower end of the last interval. Raises `ValueError` where no threshold reaches
    the rate: with an `increase`, boundaries cannot be more frequent than rises are.
    """
    unsure, begin = jnp.asarray(surprise, jnp.float32), jnp.asarray(starts)

    def rule(threshold: float) -> Bool[Array, "batch length"]:
        if increase is None:
            return over_threshold(unsure, threshold)
        return over_both(unsure, begin, threshold, increase)

    def rate_at(threshold: float) -> float:
        return float(jnp.mean(rule(threshold) | begin))

    low, high = 0.0, float(np.max(surprise[np.isfinite(surprise)], initial=0.0))
    if rate_at(low) < rate:
        raise ValueError(
            f"no threshold on entropy draws boundaries at {rate} of all bytes: even 0 draws them at {rate_at(low):.3f}; "
            "ask for a smaller increase"
        )
    while high - low > 1e-6:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if rate_at(middle) >= rate else (low, middle)
    return low
