"""Routers that train on the boundaries of another router."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Float, PyTree

from estimators.base import AbstractRouter, Layout, Routed, SamplingOptions
from estimators.equations import (
    action_log_prob,
)


class AbstractOffPolicyRouter(AbstractRouter):
    """In training, takes boundaries drawn by another router and scores them under its own policy; otherwise draws its own.

    The model is thus trained on other boundaries than it generates with; evaluation reports both.
    """


class OffPolicy(AbstractOffPolicyRouter):
    """In training, boundaries drawn by the `behaviour` and scored under the `policy`; in evaluation, the policy's own.

    `ImportanceWeight` makes the score-function estimator unbiased again. It needs a behaviour whose logits give the
    probabilities of its actions. Every sampling router will do except `UniformRouter`, which draws an exact number of
    boundaries: use `Bernoulli` instead.
    """

    policy: AbstractRouter
    behaviour: AbstractRouter

    @property
    def dim(self) -> int | None:
        return self.policy.dim

    @property
    def rate(self) -> float | None:
        return self.policy.rate

    @property
    def initial_rate(self) -> float | None:
        return self.behaviour.initial_rate

    def init_state(self, batch: int) -> PyTree[Array]:
        return self.policy.init_state(batch)

    def route(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        options: SamplingOptions,
        state: PyTree[Array] = None,
    ) -> Routed:
        if not options.training or state is not None:
            return self.policy.route(hidden, layout, dataclasses.replace(options, training=False), state)
        drawn = self.behaviour(hidden, layout, options)
        scored = self.policy(hidden, layout, dataclasses.replace(options, actions=drawn.actions))
        log_prob = jax.lax.stop_gradient(action_log_prob(drawn.logits, drawn.actions))
        return Routed(dataclasses.replace(scored, behaviour_log_prob=log_prob), None)


class Guided(AbstractOffPolicyRouter):
    """In training, boundaries drawn by the `guide` and scored under the `student`; in evaluation, the student's own.

    With `Imitation` as the objective, the student learns the guide's boundaries, and generation needs no guide.
    """

    student: AbstractRouter
    guide: AbstractRouter

    @property
    def dim(self) -> int | None:
        return self.student.dim

    @property
    def rate(self) -> float | None:
        return self.guide.rate

    @property
    def initial_rate(self) -> float | None:
        return self.guide.initial_rate

    def init_state(self, batch: int) -> PyTree[Array]:
        return self.student.init_state(batch)

    def route(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        options: SamplingOptions,
        state: PyTree[Array] = None,
    ) -> Routed:
        if not options.training or state is not None:
            return self.student.route(hidden, layout, dataclasses.replace(options, training=False), state)
        drawn = self.guide(hidden, layout, options)
        # The student's rate follows the guide's, so `target_rate` is dropped.
        return self.student.route(hidden, layout, dataclasses.replace(options, actions=drawn.actions, target_rate=None))
