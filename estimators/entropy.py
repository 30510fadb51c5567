"""Boundaries where a small language model is unsure of what comes: BLT's patching rules.

"BLT" is Pagnoni et al., "Byte latent transformer: patches scale better than tokens".
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from estimators.base import (
    AbstractChunker,
    AbstractEstimator,
    AbstractObjective,
    AbstractRouter,
    Boundaries,
    Draw,
    Frozen,
    Layout,
    Routed,
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

    def prefill(self, bytes: Int[Array, "batch length"], *, mask: Bool[Array, "batch length"]) -> HasState:
        """The same for the first bytes of some texts, and what `step` needs."""
        ...

    def step(self, bytes: Int[Array, " batch"], state: PyTree[Array], advance: Bool[Array, " batch"]) -> HasChange:
        """The next byte of the texts that advance."""
        ...


@runtime_checkable
class HasState(Protocol):
    """A prediction at every row, and what is kept of the rows."""

    @property
    def logits(self) -> Float[Array, "batch length vocab"]: ...

    @property
    def state(self) -> PyTree[Array]: ...


@runtime_checkable
class HasChange(Protocol):
    """A prediction at the next row, and how what is kept changes."""

    @property
    def logits(self) -> Float[Array, "batch vocab"]: ...

    @property
    def change(self) -> PyTree[Array]: ...


def surprise(model: ByteModel, layout: Layout) -> Float[Array, "batch length"]:
    """$H_{i-1}$: the entropy in nats of the prediction of byte i, made at row i - 1; infinite where a document starts."""
    return _surprise(model(layout.bytes, segments=layout.segments, mask=layout.mask).logits, layout)


def _surprise(logits: Float[Array, "batch length vocab"], layout: Layout) -> Float[Array, "batch length"]:
    before = jnp.pad(entropy(logits)[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(layout.starts, jnp.inf, before)


def over_threshold(surprise: Float[Array, "*shape"], threshold: float | Float[Array, ""]) -> Bool[Array, "*shape"]:
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
    return candidate_runs(surprise, starts, threshold, increase) % 2 == 1


def candidate_runs(
    surprise: Float[Array, "batch length"],
    starts: Bool[Array, "batch length"],
    threshold: float | Float[Array, ""],
    increase: float | Float[Array, ""],
) -> Int[Array, "batch length"]:
    """How many candidates of the combined rule in a row end at each row, 0 where it is none itself."""
    before = jnp.pad(surprise[:, :-1], ((0, 0), (1, 0)), constant_values=jnp.inf)
    candidate = (surprise > threshold) & (surprise - before > increase) | starts
    place = jnp.arange(surprise.shape[1])[None, :]
    # The last row that is no candidate, or the start of this document: candidates are counted from there.
    since = jnp.where(~candidate, place, jnp.where(starts, place - 1, -1))
    return place - jax.lax.cummax(since, axis=1)


class EntropyMemory(eqx.Module):
    """The byte model's `state`; the entropy of its prediction of the `next` byte; the `surprise` of the last row, and how many
    candidates of the combined rule end there in a `run`."""

    state: PyTree[Array]
    next: Float[Array, " batch"]
    surprise: Float[Array, " batch"]
    run: Int[Array, " batch"]


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
        return self.boundaries(surprise(self.model(), layout), layout)

    def boundaries(self, surprise: Float[Array, "batch length"], layout: Layout) -> Boundaries:
        """Those of the rule, of whole documents."""
        if self.increase is None:
            return certain(over_threshold(surprise, self.threshold()), layout)
        return certain(over_both(surprise, layout.starts, self.threshold(), self.increase()), layout)

    def prefill(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Routed:
        ready = self.model().prefill(layout.bytes, mask=layout.mask)
        unsure, last = _surprise(ready.logits, layout), jnp.maximum(jnp.sum(layout.mask, axis=1, keepdims=True) - 1, 0)

        def at_last(rows: Array) -> Array:
            return jnp.take_along_axis(rows, last, axis=1, mode="clip")[:, 0]

        run = jnp.zeros(layout.mask.shape, jnp.int32)
        if self.increase is not None:
            run = candidate_runs(unsure, layout.starts, self.threshold(), self.increase()).astype(jnp.int32)
        memory = EntropyMemory(ready.state, at_last(entropy(ready.logits)), at_last(unsure), at_last(run))
        given = draw.actions
        return Routed(self.boundaries(unsure, layout) if given is None else certain(given, layout), memory)

    def step(self, hidden: Float[Array, "batch 1 dim"], layout: Layout, draw: Draw, memory: EntropyMemory) -> Routed:
        read = self.model().step(layout.bytes[:, 0], memory.state, layout.mask[:, 0])
        unsure, run = memory.next, memory.run
        actions = over_threshold(unsure, self.threshold())
        if self.increase is not None:
            run = jnp.where(actions & (unsure - memory.surprise > self.increase()), run + 1, 0)
            actions = run % 2 == 1
        actions = actions[:, None] if draw.actions is None else draw.actions
        after = EntropyMemory(read.change, entropy(read.logits[:, None])[:, 0], unsure, run)
        return Routed(certain(actions, layout), after)


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
