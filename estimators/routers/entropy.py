"""Boundaries before bytes that a small language model predicts with high entropy: BLT's patching rules.

"BLT" is Pagnoni et al., "Byte latent transformer: patches scale better than tokens". Its code marks the byte that starts a
patch. Here a boundary is where a token closes, which is one byte earlier: the position that makes the prediction. As in BLT,
the token level thus runs right before the byte that is hard to predict.
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
    AbstractRouter,
    Frozen,
    Layout,
    Routed,
    SamplingOptions,
)
from estimators.bounds import Finite, require_within
from estimators.decode_state import last_positions
from estimators.equations import entropy, patch_on_rise, patch_on_rise_over_threshold, patch_over_threshold
from estimators.routers.rules import certain


@runtime_checkable
class HasLogits(Protocol):
    """A next-byte prediction at every position."""

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

    def init_state(self, batch: int) -> PyTree[Array]:
        """The decode state before the first byte."""
        ...

    def decode(
        self, bytes: Int[Array, "batch length"], state: PyTree[Array], *, mask: Bool[Array, "batch length"]
    ) -> HasUpdate:
        """Predictions at the next bytes of each sequence; `mask` marks those that are not padding."""
        ...


@runtime_checkable
class HasUpdate(Protocol):
    """A next-byte prediction at every position, and the update of the decode state."""

    @property
    def logits(self) -> Float[Array, "batch length vocab"]: ...

    @property
    def update(self) -> PyTree[Array]: ...


def next_byte_entropy(model: ByteModel, layout: Layout) -> Float[Array, "batch length"]:
    """$H_i$: the entropy in nats of the next-byte prediction at position i."""
    return entropy(model(layout.bytes, segments=layout.segments, mask=layout.mask).logits)


class AbstractPatchRule(eqx.Module):
    """Decides from two entropies whether a patch ends. Each position is decided separately, as decoding needs."""

    @abstractmethod
    def __call__(
        self,
        entropies: Float[Array, "*shape"],
        before: Float[Array, "*shape"],
        document_positions: Int[Array, "*shape"],
    ) -> Bool[Array, "*shape"]:
        """Whether a patch ends at each position: `entropies` in nats are those of the next-byte predictions there, `before`
        those one position earlier, and `document_positions` count from 0 in each document."""


class GlobalRule(AbstractPatchRule):
    """The entropy passes a threshold: `equations.patch_over_threshold`."""

    threshold: Frozen[Float[Array, ""]]

    def __init__(self, threshold: float):
        """`threshold` in nats. Raises `ValueError` for one that is not finite."""
        require_within("threshold", threshold, Finite)
        self.threshold = Frozen(jnp.asarray(threshold, jnp.float32))

    def __call__(
        self,
        entropies: Float[Array, "*shape"],
        before: Float[Array, "*shape"],
        document_positions: Int[Array, "*shape"],
    ) -> Bool[Array, "*shape"]:
        return patch_over_threshold(entropies, document_positions, self.threshold())


class RiseRule(AbstractPatchRule):
    """The entropy rises by more than a threshold: `equations.patch_on_rise`."""

    threshold: Frozen[Float[Array, ""]]

    def __init__(self, threshold: float):
        """`threshold` in nats. Raises `ValueError` for one that is not finite."""
        require_within("threshold", threshold, Finite)
        self.threshold = Frozen(jnp.asarray(threshold, jnp.float32))

    def __call__(
        self,
        entropies: Float[Array, "*shape"],
        before: Float[Array, "*shape"],
        document_positions: Int[Array, "*shape"],
    ) -> Bool[Array, "*shape"]:
        return patch_on_rise(entropies, before, document_positions, self.threshold())


class CombinedRule(AbstractPatchRule):
    """The entropy passes a threshold and rises by more than an increase: `equations.patch_on_rise_over_threshold`."""

    threshold: Frozen[Float[Array, ""]]
    increase: Frozen[Float[Array, ""]]

    def __init__(self, threshold: float, increase: float = 0.0):
        """Both in nats. Raises `ValueError` for values that are not finite."""
        require_within("threshold", threshold, Finite)
        require_within("increase", increase, Finite)
        self.threshold = Frozen(jnp.asarray(threshold, jnp.float32))
        self.increase = Frozen(jnp.asarray(increase, jnp.float32))

    def __call__(
        self,
        entropies: Float[Array, "*shape"],
        before: Float[Array, "*shape"],
        document_positions: Int[Array, "*shape"],
    ) -> Bool[Array, "*shape"]:
        return patch_on_rise_over_threshold(entropies, before, document_positions, self.threshold(), self.increase())


def patch_ends(
    rule: AbstractPatchRule,
    entropies: Float[Array, "batch length"],
    document_positions: Int[Array, "batch length"],
    last: Float[Array, "batch 1"] | None = None,
) -> Bool[Array, "batch length"]:
    """Where patches end, in whole documents or after a position whose entropy was `last`."""
    last = jnp.zeros_like(entropies[:, :1]) if last is None else last
    return rule(entropies, jnp.concatenate([last, entropies[:, :-1]], axis=1), document_positions)


class EntropyState(eqx.Module):
    """The decode state of the byte `model`, and the entropy of its `last` prediction."""

    model: PyTree[Array]
    last: Float[Array, "batch 1"]


class EntropyRouter(AbstractRouter):
    """Boundaries where `rule` ends a patch, given the entropies of a frozen byte model.

    `target_rate` is the rate that the rule's threshold was chosen for, by `find_threshold` on training text.
    """

    model: Frozen[ByteModel]
    rule: AbstractPatchRule
    target_rate: float = eqx.field(static=True)

    def __init__(self, model: ByteModel, rule: AbstractPatchRule, *, target_rate: float):
        """`model` is not trained."""
        self.model, self.rule, self.target_rate = Frozen(model), rule, target_rate

    @property
    def rate(self) -> float | None:
        return self.target_rate

    def init_state(self, batch: int) -> EntropyState:
        return EntropyState(self.model().init_state(batch), jnp.zeros((batch, 1), jnp.float32))

    def route(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        options: SamplingOptions,
        state: EntropyState | None = None,
    ) -> Routed:
        if state is None:
            if options.actions is not None:
                return Routed(certain(options.actions, layout), None)
            entropies = next_byte_entropy(self.model(), layout)
            return Routed(certain(patch_ends(self.rule, entropies, layout.document_positions), layout), None)
        decoded = self.model().decode(layout.bytes, state.model, mask=layout.mask)
        entropies = entropy(decoded.logits)
        ends = (
            patch_ends(self.rule, entropies, layout.document_positions, state.last)
            if options.actions is None
            else options.actions
        )
        update = EntropyState(decoded.update, last_positions(state.last, entropies, layout.lengths))
        return Routed(certain(ends, layout), update)


def find_threshold(
    entropies: np.ndarray, document_positions: np.ndarray, rate: float, rule: Callable[[float], AbstractPatchRule]
) -> float:
    """The threshold at which a rule draws boundaries at `rate` on the text that `entropies` were measured on.

    `rule` makes a rule from a threshold. `entropies` in nats and `document_positions` are `batch length`, without padding. The
    threshold is the lower end of a bisection interval of a millionth of a nat; since the rate is a step function, it may not
    be met exactly. Raises `ValueError` if no threshold reaches the rate: the combined rule draws boundaries only where the
    entropy also rises enough.
    """
    measured, places = jnp.asarray(entropies, jnp.float32), jnp.asarray(document_positions)

    def rate_at(threshold: float) -> float:
        return float(jnp.mean(patch_ends(rule(threshold), measured, places)))

    high = float(np.max(entropies, initial=0.0)) + 1e-6
    low = -high
    if rate_at(low) < rate:
        raise ValueError(
            f"no entropy threshold gives boundaries at {rate} of all bytes: the lowest one gives {rate_at(low):.3f}; "
            "ask for a lower rate or, with the combined rule, a smaller increase"
        )
    while high - low > 1e-6:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if rate_at(middle) >= rate else (low, middle)
    return low
