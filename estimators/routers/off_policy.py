"""Routers that train on the boundaries of another router."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod

import jax
from jaxtyping import Array, Float, PyTree

from estimators.base import AbstractRouter, Boundaries, Layout, Routed, SamplingOptions
from estimators.equations import action_log_prob


class AbstractOffPolicyRouter(AbstractRouter):
    """In training, takes boundaries drawn by another router and scores them under its own policy; otherwise draws its own.

    The model is thus trained on other boundaries than it generates with; evaluation reports both.
    """

    @property
    @abstractmethod
    def own(self) -> AbstractRouter:
        """The policy that is trained, and that draws in evaluation and generation."""

    @property
    @abstractmethod
    def other(self) -> AbstractRouter:
        """The router that draws in training."""

    @abstractmethod
    def scored(
        self, hidden: Float[Array, "batch length dim"], layout: Layout, options: SamplingOptions, drawn: Boundaries
    ) -> Boundaries:
        """Boundaries `drawn` by the other router, scored under the own policy."""

    @property
    def off_policy(self) -> bool:
        return True

    @property
    def dim(self) -> int | None:
        return self.own.dim

    @property
    def initial_rate(self) -> float | None:
        return self.other.initial_rate

    def init_state(self, batch: int) -> PyTree[Array]:
        return self.own.init_state(batch)

    def route(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        options: SamplingOptions,
        state: PyTree[Array] = None,
    ) -> Routed:
        if not options.training or state is not None:
            return self.own.route(hidden, layout, dataclasses.replace(options, training=False), state)
        drawn = self.other(hidden, layout, options)
        # The own policy may remember the actions: it must score those that stand.
        drawn = dataclasses.replace(drawn, actions=options.limited(drawn.actions, layout))
        return Routed(self.scored(hidden, layout, options, drawn), None)


class OffPolicy(AbstractOffPolicyRouter):
    """In training, boundaries drawn by the `behaviour` and scored under the `policy`; in evaluation, the policy's own.

    `ImportanceWeight` makes the score-function estimator unbiased again. It needs a behaviour whose logits give the
    probabilities of its actions. Every sampling router will do except `UniformRouter`, which draws an exact number of
    boundaries: use `Bernoulli` instead.
    """

    policy: AbstractRouter
    behaviour: AbstractRouter

    @property
    def own(self) -> AbstractRouter:
        return self.policy

    @property
    def other(self) -> AbstractRouter:
        return self.behaviour

    @property
    def rate(self) -> float | None:
        return self.policy.rate

    def scored(
        self, hidden: Float[Array, "batch length dim"], layout: Layout, options: SamplingOptions, drawn: Boundaries
    ) -> Boundaries:
        scored = self.policy(hidden, layout, dataclasses.replace(options, actions=drawn.actions))
        log_prob = jax.lax.stop_gradient(action_log_prob(drawn.logits, drawn.actions))
        return dataclasses.replace(scored, behaviour_log_prob=log_prob)


class Guided(AbstractOffPolicyRouter):
    """In training, boundaries drawn by the `guide` and scored under the `student`; in evaluation, the student's own.

    With `Imitation` as the objective, the student learns the guide's boundaries, and generation needs no guide.
    """

    student: AbstractRouter
    guide: AbstractRouter

    @property
    def own(self) -> AbstractRouter:
        return self.student

    @property
    def other(self) -> AbstractRouter:
        return self.guide

    @property
    def rate(self) -> float | None:
        return self.guide.rate

    def scored(
        self, hidden: Float[Array, "batch length dim"], layout: Layout, options: SamplingOptions, drawn: Boundaries
    ) -> Boundaries:
        # The student's rate follows the guide's, so `target_rate` is dropped.
        return self.student(hidden, layout, dataclasses.replace(options, actions=drawn.actions, target_rate=None))
