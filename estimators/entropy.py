"""Boundaries before bytes that a small language model does not foresee: BLT's patching rules.

"BLT" is Pagnoni et al., "Byte latent transformer: patches scale better than tokens". Its program says with which byte a patch
starts; here a boundary stands where a token closes, so it stands one byte earlier: at the row that makes the prediction. The
token level then speaks right before the byte that is hard to foresee, as in BLT.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import equinox as eqx
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
from estimators.equations import entropy, patch_on_rise, patch_on_rise_over_threshold, patch_over_threshold
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


def next_byte_entropy(model: ByteModel, layout: Layout) -> Float[Array, "batch length"]:
    """$H_i$: the entropy in nats of the prediction that row i makes of the byte after it."""
    return entropy(model(layout.bytes, segments=layout.segments, mask=layout.mask).logits)


class AbstractPatchRule(eqx.Module):
    """Says from two entropies where patches end. Each row is decided by itself, so that a text can be read byte by byte."""

    @abstractmethod
    def __call__(
        self, entropies: Float[Array, "*shape"], before: Float[Array, "*shape"], numbers: Int[Array, "*shape"]
    ) -> Bool[Array, "*shape"]:
        """Whether a patch ends with each row: `entropies` in nats are those of the rows' predictions, `before` those of the
        rows before them, `numbers` the places of the rows in their documents, from 0."""


class GlobalRule(AbstractPatchRule):
    """The entropy passes a threshold: `equations.patch_over_threshold`."""

    threshold: Frozen[Float[Array, ""]]

    def __init__(self, threshold: float):
        """`threshold` in nats."""
        self.threshold = Frozen(jnp.asarray(threshold, jnp.float32))

    def __call__(
        self, entropies: Float[Array, "*shape"], before: Float[Array, "*shape"], numbers: Int[Array, "*shape"]
    ) -> Bool[Array, "*shape"]:
        return patch_over_threshold(entropies, numbers, self.threshold())


class RiseRule(AbstractPatchRule):
    """The entropy rises by more than a threshold: `equations.patch_on_rise`."""

    threshold: Frozen[Float[Array, ""]]

    def __init__(self, threshold: float):
        """`threshold` in nats."""
        self.threshold = Frozen(jnp.asarray(threshold, jnp.float32))

    def __call__(
        self, entropies: Float[Array, "*shape"], before: Float[Array, "*shape"], numbers: Int[Array, "*shape"]
    ) -> Bool[Array, "*shape"]:
        return patch_on_rise(entropies, before, numbers, self.threshold())


class CombinedRule(AbstractPatchRule):
    """The entropy passes a threshold and rises by more than an increase: `equations.patch_on_rise_over_threshold`."""

    threshold: Frozen[Float[Array, ""]]
    increase: Frozen[Float[Array, ""]]

    def __init__(self, threshold: float, increase: float = 0.0):
        """Both in nats."""
        self.threshold = Frozen(jnp.asarray(threshold, jnp.float32))
        self.increase = Frozen(jnp.asarray(increase, jnp.float32))

    def __call__(
        self, entropies: Float[Array, "*shape"], before: Float[Array, "*shape"], numbers: Int[Array, "*shape"]
    ) -> Bool[Array, "*shape"]:
        return patch_on_rise_over_threshold(entropies, before, numbers, self.threshold(), self.increase())


def patch_ends(
    rule: AbstractPatchRule, entropies: Float[Array, "batch length"], numbers: Int[Array, "batch length"]
) -> Bool[Array, "batch length"]:
    """Where the patches of whole documents end."""
    before = jnp.pad(entropies[:, :-1], ((0, 0), (1, 0)))
    return rule(entropies, before, numbers)


class EntropyMemory(eqx.Module):
    """The byte model's `state`, and the entropy of the `last` prediction it made."""

    state: PyTree[Array]
    last: Float[Array, "batch 1"]


class EntropyRouter(AbstractRouter):
    """Boundaries where a rule on a frozen byte model's entropies ends a patch.

    `target_rate` is what the rule's threshold was chosen to meet, by `find_threshold` on training text.
    """

    model: Frozen[ByteModel]
    rule: AbstractPatchRule
    target_rate: float = eqx.field(static=True)

    def __init__(self, model: ByteModel, rule: AbstractPatchRule, *, target_rate: float):
        """`model` is left as it is."""
        self.model, self.rule, self.target_rate = Frozen(model), rule, target_rate

    @property
    def rate(self) -> float | None:
        return self.target_rate

    def __call__(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Boundaries:
        if draw.actions is not None:
            return certain(draw.actions, layout)
        return certain(patch_ends(self.rule, next_byte_entropy(self.model(), layout), layout.numbers), layout)

    def prefill(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Routed:
        ready = self.model().prefill(layout.bytes, mask=layout.mask)
        entropies = entropy(ready.logits)
        last = jnp.maximum(jnp.sum(layout.mask, axis=1, keepdims=True) - 1, 0)
        memory = EntropyMemory(ready.state, jnp.take_along_axis(entropies, last, axis=1, mode="clip"))
        actions = patch_ends(self.rule, entropies, layout.numbers) if draw.actions is None else draw.actions
        return Routed(certain(actions, layout), memory)

    def step(self, hidden: Float[Array, "batch 1 dim"], layout: Layout, draw: Draw, memory: EntropyMemory) -> Routed:
        read = self.model().step(layout.bytes[:, 0], memory.state, layout.mask[:, 0])
        entropies = entropy(read.logits[:, None])
        actions = self.rule(entropies, memory.last, layout.numbers) if draw.actions is None else draw.actions
        return Routed(certain(actions, layout), EntropyMemory(read.change, entropies))


class Entropy(AbstractEstimator):
    """A token closes where the next byte is hard to foresee (BLT)."""

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(self, router: EntropyRouter, *, chunker: AbstractChunker):
        """`router` holds the byte model and the rule."""
        self.router, self.chunker, self.objective = router, chunker, NoObjective()


def find_threshold(
    entropies: np.ndarray, numbers: np.ndarray, rate: float, rule: Callable[[float], AbstractPatchRule]
) -> float:
    """The threshold at which a rule draws boundaries at `rate` on the text that `entropies` were measured on.

    `rule` makes the rule of a threshold. `entropies` in nats and `numbers`, the places of the rows in their documents, are
    `batch length`, without padding. Found by bisection to within a millionth of a nat; the rate moves in steps, and the
    threshold returned is the lower end of the last interval. Raises `ValueError` where no threshold reaches the rate: those of
    the combined rule draw no boundaries beside the rises.
    """
    measured, places = jnp.asarray(entropies, jnp.float32), jnp.asarray(numbers)

    def rate_at(threshold: float) -> float:
        return float(jnp.mean(patch_ends(rule(threshold), measured, places)))

    high = float(np.max(entropies, initial=0.0)) + 1e-6
    low = -high
    if rate_at(low) < rate:
        raise ValueError(
            f"no threshold on entropy draws boundaries at {rate} of all bytes: the lowest draws them at {rate_at(low):.3f}; "
            "ask for a lower rate, or with the combined rule for a smaller increase"
        )
    while high - low > 1e-6:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if rate_at(middle) >= rate else (low, middle)
    return low
