"""Constraints on any router."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from estimators.base import AbstractRouter, Boundaries, Layout, Routed, SamplingOptions
from estimators.decode_state import last_positions
from estimators.equations import NEVER, chunk_sizes, within_limits
from estimators.limits import Limits
from estimators.routers.rules import CERTAIN


class AbstractConstraint(eqx.Module):
    """Where boundaries may and must stand, as `Limits` on the sizes of chunks that follow from the text.

    `least = NEVER` at a position forbids a boundary there, `most = 1` forces one; other numbers let it depend on how many
    positions the chunk has by then. Where several constraints speak, the largest `least` and the smallest `most` hold, and what
    is forbidden is not forced: a chunk then ends as soon as it may. Starts of documents stand above constraints.
    """

    outermost_only: ClassVar[bool] = False
    """Whether it reads bytes, so that it has no meaning inside a hierarchy."""

    @property
    def reach(self) -> int:
        """How many bytes before a position its limits there depend on, at most; they must lie in the same document."""
        return 0

    @abstractmethod
    def limits(self, layout: Layout) -> Limits:
        """The limits at each position i, which may depend on the bytes i - `reach` to i of its document."""

    def rate(self, drawn: float) -> float:
        """An upper estimate of the fraction of positions with a boundary, where each free one has one with probability `drawn`.
        For capacities that are chosen without a text."""
        return drawn


class ConstrainedState(eqx.Module):
    """The decode state of the `router`, the `size` of the open chunk, and the `recent` bytes that constraints look back at."""

    router: PyTree[Array]
    size: Int[Array, " batch"]
    recent: Int[Array, "batch reach"]


class Constrained(AbstractRouter):
    r"""Any router, with boundaries only where all `constraints` allow them, and everywhere that one demands them.

    With $s_i$ the size of the chunk that a boundary at i would close, i included, and limits $m_i, n_i$:

    $a_i = 1[s_i \ge m_i]\,(d_i \lor 1[s_i \ge n_i])$ for the draws d of the router, from left to right, and 1 at starts.

    A position is *free* where $m_i \le s_i < n_i$ and no document starts. Only there has the router decided, with the
    log-odds that it has given all earlier actions, drawn or not; so the probability of the actions is the product over free
    positions. All others are `constrained`: they are not `decided`, and their `probs` (0 or 1), `logits` and `relaxed` are
    constants. Hence policy gradients, entropies, importance weights, the binomial prior and imitation run over the free
    positions $F$, and H-Net's smoothing and confidence take the others as certain. Policy losses are divided by the number of
    positions that could have been free (`Boundaries.deciding`), which no action changes, so that they stay exact gradients of
    an expected loss.

    A target rate π is one of free positions: the rate losses bring $\frac{1}{|F|}\sum_{i \in F} p_i$ to it (the ratio loss
    counts starts too, as without constraints), and the controller of a run the fraction of drawn boundaries there
    (`LossOutput.free_rate`). Of all N positions with D documents, $(\pi |F| + |forced| + D)/N$ then have a boundary.

    Given actions are taken as they are; what stands where it was forced or forbidden is then `constrained` too.

    Cost: what depends on the text alone is elementwise. For limits on sizes, `SamplingOptions.sampler` runs over the positions
    once, and once more for a policy that remembers its actions: some integers for each position.
    """

    router: AbstractRouter
    constraints: tuple[AbstractConstraint, ...] = eqx.field(converter=tuple)

    @property
    def dim(self) -> int | None:
        return self.router.dim

    @property
    def rate(self) -> float | None:
        """An upper estimate of the fraction of all positions with a boundary at the router's target rate."""
        return self._of_all(self.router.rate)

    @property
    def initial_rate(self) -> float | None:
        return self._of_all(self.router.initial_rate)

    @property
    def off_policy(self) -> bool:
        return self.router.off_policy

    @property
    def reach(self) -> int:
        """How many bytes before a position its constraints look back at."""
        return max((constraint.reach for constraint in self.constraints), default=0)

    def init_state(self, batch: int) -> ConstrainedState:
        recent = jnp.zeros((batch, self.reach), jnp.int32)
        return ConstrainedState(self.router.init_state(batch), jnp.zeros((batch,), jnp.int32), recent)

    def route(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        options: SamplingOptions,
        state: ConstrainedState | None = None,
    ) -> Routed:
        limits = self.limits(layout, state).and_also(options.limits)
        options = dataclasses.replace(options, limits=limits)
        routed = self.router.route(hidden, layout, options, None if state is None else state.router)
        actions = options.limited(routed.boundaries.actions, layout)
        boundaries = _held(routed.boundaries, actions, limits, layout)
        if state is None:
            return Routed(boundaries, None)
        recent = last_positions(state.recent, layout.bytes, layout.lengths)
        return Routed(boundaries, ConstrainedState(routed.update, _open_size(actions, state.size, layout), recent))

    def limits(self, layout: Layout, state: ConstrainedState | None = None) -> Limits:
        """The limits of all constraints together."""
        seen = layout if state is None else layout.preceded_by(state.recent)
        size = None if state is None else state.size
        free = jnp.ones_like(layout.bytes)
        found = Limits(free, jnp.full_like(free, NEVER), False, size)
        for constraint in self.constraints:
            own = constraint.limits(seen)
            least, most = (one[:, seen.bytes.shape[1] - layout.bytes.shape[1] :] for one in (own.least, own.most))
            found = found.and_also(Limits(least, most, own.sized))
        return found

    def _of_all(self, drawn: float | None) -> float | None:
        if drawn is None:
            return None
        for constraint in self.constraints:
            drawn = constraint.rate(drawn)
        return drawn


def _held(boundaries: Boundaries, actions: Bool[Array, "batch length"], limits: Limits, layout: Layout) -> Boundaries:
    """The boundaries with these actions, certain wherever the limits left no choice."""
    sizes = chunk_sizes(actions, layout.starts, limits.size)
    forced = within_limits(jnp.zeros_like(actions), sizes, limits.least, limits.most)
    allowed = within_limits(jnp.ones_like(actions), sizes, limits.least, limits.most)
    held = (forced | ~allowed) & layout.free
    settled = limits.settled & layout.free
    if boundaries.constrained is not None and boundaries.settled is not None:
        held, settled = held | boundaries.constrained, settled | boundaries.settled
    value = actions.astype(jnp.float32)
    relaxed, behaviour = boundaries.relaxed, boundaries.behaviour_log_prob
    return dataclasses.replace(
        boundaries,
        actions=actions,
        logits=jnp.where(held, CERTAIN * (2.0 * value - 1.0), boundaries.logits),
        probs=jnp.where(held, value, boundaries.probs),
        decided=boundaries.decided & ~held,
        relaxed=None if relaxed is None else jnp.where(held, value, relaxed),
        behaviour_log_prob=None if behaviour is None else jnp.where(held, 0.0, behaviour),
        constrained=held,
        settled=settled,
    )


def _open_size(
    actions: Bool[Array, "batch length"], before: Int[Array, " batch"], layout: Layout
) -> Int[Array, " batch"]:
    """The size of the chunk that is open after these positions."""
    place = jnp.arange(actions.shape[1], dtype=jnp.int32)[None, :]
    last = jnp.max(jnp.where(actions, place + 1, 0), axis=1)
    return layout.lengths - jnp.where(last > 0, last, -before)
