r"""Where estimators lead: the gradient flow $d\theta/dt = -E[\hat g(\theta)]$ from one start, and stochastic gradient descent.

The loss of a string is its mean negative log-likelihood plus a price for every boundary, which every estimator is charged
exactly; without it all would draw a boundary at every byte.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox import Partial
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from estimators import AbstractReduction, Discount, EarlyExit
from experiments.laboratory.fields import (
    Field,
    PolicyLoss,
    StringLosses,
    drawn_loss,
    exact,
    exact_smooth,
    expected_chunking,
    expected_relaxed,
    expected_score,
    greedy_chunking,
    greedy_loss,
    greedy_neighbourhood,
    sampled_score,
    string_index,
    string_losses,
)
from experiments.laboratory.gradients import Subjects, given_critic, linear_critic, without_weights
from experiments.laboratory.greedy import greedy_start
from experiments.laboratory.moments import returns_by_string
from experiments.laboratory.results import Flow
from experiments.laboratory.subjects import RATE, PerDecision, PerString, Subject, tabulate, with_logits
from unet import next_logprobs

SMOOTH_LENGTH = 7
"""Bytes of each text in the flows of dynamic chunking, which run the model on every string at every step."""

SAVED = 25
"""Points kept of every trajectory after its start."""


@dataclasses.dataclass(frozen=True)
class PlannedFlow:
    """A flow to be integrated; `against` names the one it is compared with."""

    name: str
    model: str
    objective: str
    field: Field
    policy_loss: PolicyLoss
    against: str


def start_of(subject: Subject) -> PerDecision:
    """Decisions at the rate that the models were trained with."""
    texts, length = subject.texts.shape
    return jnp.full((texts, length - 1), jax.scipy.special.logit(RATE))


def flows(subjects: Subjects, *, time: float, key: PRNGKeyArray) -> tuple[list[Flow], list[int]]:
    """The flow of every estimator for `time` units, and for each the number of the flow to compare it with."""
    start = start_of(subjects.distribute)
    plain, pooled = tabulate(subjects.distribute, start), tabulate(subjects.mean, start)
    strings = subjects.distribute.strings
    reference = "exact gradient"
    planned = [
        PlannedFlow(
            reference, "distribute", "drawn", Partial(exact, plain, strings), Partial(drawn_loss, None), reference
        )
    ]
    for discount in (1.0, 0.99, 0.9, 0.5):
        returns = returns_by_string((EarlyExit(), Discount(discount)), start, strings, plain)
        field = Partial(expected_score, returns, strings)
        planned.append(
            PlannedFlow(
                f"score function, γ = {discount:g}", "distribute", "drawn", field, Partial(drawn_loss, None), reference
            )
        )
    # Without likelihoods only the price is left; as tables, so that no further program is compiled.
    flat = jax.tree.map(jnp.zeros_like, pooled)
    fields = {
        reference: Partial(exact, pooled, strings),
        "score function, γ = 1": Partial(
            expected_score, returns_by_string((EarlyExit(),), start, strings, pooled), strings
        ),
        "straight-through Gumbel, τ = .5": Partial(expected_relaxed, pooled, strings, 0.5),
        "straight-through Bernoulli": Partial(expected_relaxed, pooled, strings, None),
        "the price alone": Partial(exact, flat, strings),
    }
    planned += [
        PlannedFlow(name, "mean", "drawn", field, Partial(drawn_loss, None), reference)
        for name, field in fields.items()
    ]
    by_model = {
        "distribute": string_losses(plain.log_prob, strings),
        "mean": string_losses(pooled.log_prob, strings),
    }
    found = [
        _flow_along(plan, by_model[plan.model], *integrate(plan.field, by_model[plan.model], start, time))
        for plan in planned
    ]
    short = dataclasses.replace(subjects.smooth, texts=subjects.smooth.texts[:, :SMOOTH_LENGTH])
    more, found_smooth = _smooth_flows(short, time, key)
    names = [(plan.model, plan.objective, plan.name) for plan in (*planned, *more)]
    against = [names.index((plan.model, plan.objective, plan.against)) for plan in (*planned, *more)]
    return [*found, *found_smooth], against


def _smooth_flows(subject: Subject, time: float, key: PRNGKeyArray) -> tuple[list[PlannedFlow], list[Flow]]:
    """Dynamic chunking: drawn boundaries from `start_of`, greedy ones from a start where they come at the same rate."""
    unweighted = without_weights(subject)
    # With probabilities of 0 and 1 nothing is smoothed: the losses that a policy approaches as it becomes deterministic.
    by_string = string_losses(certain_log_prob(unweighted), subject.strings)
    reference, around = "exact gradient", "gradient averaged over s = 1"
    drawn, greedy = Partial(drawn_loss, subject), Partial(greedy_loss, unweighted)
    planned = [
        PlannedFlow(reference, "smooth", "drawn", Partial(exact_smooth, subject), drawn, reference),
        PlannedFlow(
            "dynamic chunking, drawn", "smooth", "drawn", Partial(expected_chunking, subject), drawn, reference
        ),
        PlannedFlow(
            around, "smooth", "greedy", Partial(greedy_neighbourhood, subject, jnp.ones(()), 4), greedy, around
        ),
        PlannedFlow("dynamic chunking, greedy", "smooth", "greedy", Partial(greedy_chunking, subject), greedy, around),
    ]
    start = start_of(subject)
    starts = {"drawn": start, "greedy": greedy_start(jax.random.fold_in(key, 0), start.shape)}
    # Greedy boundaries make the field jump: steps of one length, few enough to run the model at each.
    schedule, found = DescentSteps.of(time / 300, time), []
    for plan in planned:
        times, paths = descend(plan.field, by_string, starts[plan.objective], schedule, key[None])
        found.append(_flow_along(plan, by_string, times, paths[0]))
    return planned, found


@eqx.filter_jit
def certain_log_prob(subject: Subject) -> PerString:
    """Log-likelihoods of a chunker that reads probabilities, for probabilities that equal the actions of each string."""
    strings = subject.strings

    def one(text: Array) -> Array:
        bytes = jnp.broadcast_to(text, strings.shape)
        model = with_logits(subject.model, jnp.where(strings, 20.0, -20.0))
        return next_logprobs(model(bytes, actions=(strings,), training=True).logits, bytes)[:, :-1]

    return jax.lax.map(one, subject.texts)


@eqx.filter_jit
def integrate(
    field: Field, by_string: StringLosses, start: PerDecision, time: float
) -> tuple[Float[Array, " saved"], Float[Array, "saved texts decisions"]]:
    """Integrate a smooth field with adaptive steps: times and logits, the start included."""
    unused = jax.random.key(0)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, logits, args: -(field(logits, unused) + by_string.price_gradient(logits))),
        diffrax.Tsit5(),
        t0=0.0,
        t1=time,
        dt0=time / 1000,
        y0=start,
        stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
        # Rounding must not carry the last time past the end.
        saveat=diffrax.SaveAt(ts=jnp.minimum(jnp.geomspace(time / 1000, time, SAVED), time)),
        max_steps=4096,
    )
    assert solution.ts is not None
    assert solution.ys is not None
    return jnp.pad(solution.ts, (1, 0)), jnp.concatenate([start[None], solution.ys])


@dataclasses.dataclass(frozen=True)
class DescentSteps:
    """Steps of gradient descent: a learning rate, so that a step takes so much time, and the steps between points kept."""

    rate: float
    steps: int

    @staticmethod
    def of(rate: float, time: float) -> DescentSteps:
        """For about so much time."""
        return DescentSteps(rate, max(1, round(time / rate / SAVED)))

    @property
    def times(self) -> Float[Array, " saved"]:
        """Of the points kept, the start included."""
        return self.rate * self.steps * jnp.arange(SAVED + 1.0)


def descend(
    field: Field, by_string: StringLosses, start: PerDecision, schedule: DescentSteps, keys: Key[Array, " paths"]
) -> tuple[Float[Array, " saved"], Float[Array, "paths saved texts decisions"]]:
    """Gradient descent, once for every key: times and logits, the start included."""
    return schedule.times, _descended(
        field, by_string, start, jnp.asarray(schedule.rate), jnp.asarray(schedule.steps), keys
    )


@eqx.filter_jit
def _descended(
    field: Field,
    by_string: StringLosses,
    start: PerDecision,
    rate: Float[Array, ""],
    steps: Int[Array, ""],
    keys: Key[Array, " paths"],
) -> Float[Array, "paths saved texts decisions"]:
    def path(key: PRNGKeyArray) -> Float[Array, "saved texts decisions"]:
        def step(number: Array, logits: PerDecision) -> PerDecision:
            return logits - rate * (field(logits, jax.random.fold_in(key, number)) + by_string.price_gradient(logits))

        def segment(logits: Array, begin: Array) -> tuple[Array, Array]:
            logits = jax.lax.fori_loop(begin, begin + steps, step, logits)
            return logits, logits

        return jnp.concatenate([start[None], jax.lax.scan(segment, start, steps * jnp.arange(SAVED))[1]])

    return jax.vmap(path)(keys)


@eqx.filter_jit
def losses_along(
    policy_loss: PolicyLoss, by_string: StringLosses, path: Float[Array, "saved texts decisions"]
) -> tuple[Float[Array, " saved"], Float[Array, ""], Float[Array, ""]]:
    """The losses along a path, the rate at its end, and the loss of the greedy string there as `StringLosses` has it."""
    losses, rates = jax.lax.map(lambda logits: policy_loss(logits, by_string), path)
    greedy = jnp.take_along_axis(by_string.losses, string_index(path[-1] > 0)[:, None], axis=1)
    return losses, rates[-1], jnp.mean(greedy)


def _flow_along(
    plan: PlannedFlow,
    by_string: StringLosses,
    times: Float[Array, " saved"],
    path: Float[Array, "saved texts decisions"],
) -> Flow:
    """A trajectory's losses, and how good the policy at its end is."""
    losses, rate, greedy = losses_along(plan.policy_loss, by_string, path)
    curve, best = np.asarray(losses).tolist(), float(jnp.mean(by_string.best))
    return Flow(
        name=plan.name,
        model=plan.model,
        objective=plan.objective,
        times=tuple(np.asarray(times).tolist()),
        losses=tuple(curve),
        start=curve[0],
        end=curve[-1],
        greedy=float(greedy),
        best=best,
        rate=float(rate),
        closed=(curve[0] - float(greedy)) / (curve[0] - best),
    )


def stochastic_flows(
    subject: Subject, *, time: float, rates: Sequence[float], paths: int, key: PRNGKeyArray
) -> tuple[list[Flow], list[int]]:
    """Stochastic gradient descent on drawn boundaries at some learning rates, means over so many `paths`; as `flows`."""
    start = start_of(subject)
    plain, strings = tabulate(subject, start), subject.strings
    by_string = string_losses(plain.log_prob, strings)

    def field(*reductions: AbstractReduction, centred: bool = False, hidden: Array | None = None) -> Field:
        return Partial(sampled_score, returns_by_string(reductions, start, strings, plain, hidden=hidden), centred)

    exit, far = EarlyExit(), Discount(0.99)
    critic = linear_critic(start, plain, strings, returns_by_string((exit, far), start, strings, plain))
    paper = "early exit, γ = .99, batch centring"
    fields = {
        "nothing": field(),
        "early exit": field(exit),
        paper: field(exit, far, centred=True),
        "early exit, γ = .9, batch centring": field(exit, Discount(0.9), centred=True),
        "early exit, γ = .99, linear critic": field(exit, far, given_critic(), hidden=critic[..., None]),
    }
    found, against = [], []
    for rate in rates:
        against += [len(found) + list(fields).index(paper)] * len(fields)
        for number, (name, field) in enumerate(fields.items()):
            keys = jax.random.split(jax.random.fold_in(key, number), paths)
            plan = PlannedFlow(f"{name}, η = {rate:g}", "distribute", "drawn", field, Partial(drawn_loss, None), paper)
            times, trajectories = descend(field, by_string, start, DescentSteps.of(rate, time), keys)
            found.append(_mean_flow([_flow_along(plan, by_string, times, path) for path in trajectories]))
    return found, against


def _mean_flow(paths: Sequence[Flow]) -> Flow:
    """The mean over paths of one model."""

    return dataclasses.replace(
        paths[0],
        losses=tuple(np.mean([path.losses for path in paths], axis=0).tolist()),
        end=float(np.mean([path.end for path in paths])),
        greedy=float(np.mean([path.greedy for path in paths])),
        rate=float(np.mean([path.rate for path in paths])),
        closed=float(np.mean([path.closed for path in paths])),
    )
