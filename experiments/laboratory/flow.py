r"""Where estimators lead: the gradient flow $d\theta/dt = -E[\hat g(\theta)]$ from one start, and the best string's loss.

The loss of a string is its mean negative log-likelihood plus a price for every boundary, which every estimator is charged
exactly; without it all would draw a boundary at every byte.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from experiments.laboratory.gradients import Subjects, linear_critic
from experiments.laboratory.moments import (
    Moments,
    credit,
    exact_gradient,
    pathwise_moments,
    relaxed_moments,
    score_moments,
    string_probs,
)
from experiments.laboratory.results import Flow
from experiments.laboratory.subjects import RATE, Subject, Tables, tabulate, with_chunker, with_logits
from unet import SelectSmooth, next_byte_log_lik

Field = Callable[[Float[Array, "texts decisions"]], Float[Array, "texts decisions"]]

SMOOTH_LENGTH = 7
"""Bytes of each text in the flows of dynamic chunking, which run the model on every string at every step."""

SAVED = 60
"""Points kept of every trajectory."""


class Landscape(eqx.Module):
    """The losses of all strings of a subject, and the price of a boundary."""

    tables: Tables
    strings: Bool[Array, "strings length"]
    price: Float[Array, ""]

    @property
    def losses(self) -> Float[Array, "texts strings"]:
        """Of every string, price included."""
        return -jnp.mean(self.tables.log_lik, axis=2) + self.price * jnp.mean(self.strings[:, 1:], axis=1)

    @property
    def best(self) -> Float[Array, " texts"]:
        """Of the best string of each text."""
        return jnp.min(self.losses, axis=1)

    def charge(self, logits: Float[Array, "texts decisions"]) -> Float[Array, "texts decisions"]:
        """The derivative of the expected price."""
        probs = jax.nn.sigmoid(logits)
        return self.price * probs * (1.0 - probs) / logits.shape[1]


def landscape(tables: Tables, strings: Bool[Array, "strings length"], rate: float = 0.3) -> Landscape:
    """The price is the one at which the best strings of all texts together draw boundaries at about `rate`."""
    low, high = 0.0, 10.0
    drawn = jnp.mean(strings[:, 1:], axis=1)
    for _ in range(40):
        middle = 0.5 * (low + high)
        best = jnp.argmin(-jnp.mean(tables.log_lik, axis=2) + middle * drawn, axis=1)
        low, high = (middle, high) if float(jnp.mean(drawn[best])) > rate else (low, middle)
    return Landscape(tables, strings, jnp.asarray(0.5 * (low + high)))


def start_of(subject: Subject) -> Float[Array, "texts decisions"]:
    """Decisions at the rate that the models were trained with."""
    texts, length = subject.texts.shape
    return jnp.full((texts, length - 1), jax.scipy.special.logit(RATE))


def flows(subjects: Subjects, *, time: float) -> list[Flow]:
    """The flow of every estimator for `time` units from `start_of` the subjects."""
    start = start_of(subjects.distribute)
    plain = tabulate(subjects.distribute, start)
    pooled = tabulate(subjects.mean, start)
    strings = subjects.distribute.strings
    ground, pool = landscape(plain, strings), landscape(pooled, strings)
    early = plain.log_lik - plain.early_log_lik[:, None]
    early_pooled = pooled.log_lik - pooled.early_log_lik[:, None]

    # Returns are worked out here, once: inside the solver the compiler would try to fold them, for minutes.
    fields: dict[str, Field] = {"exact gradient": lambda logits: exact_gradient(logits, plain, strings)}
    for discount in (1.0, 0.99, 0.9, 0.5):
        fields[f"score function, γ = {discount:g}"] = _score_field(strings, credit(early, discount))
    found = [_follow(name, "distribute", field, ground, start, time) for name, field in fields.items()]
    fields = {
        "exact gradient": lambda logits: exact_gradient(logits, pooled, strings),
        "score function, γ = 1": _score_field(strings, credit(early_pooled, 1.0)),
        "straight-through Gumbel, τ = .5": lambda logits: relaxed_moments(logits, strings, pooled, 0.5).mean,
        "straight-through Bernoulli": lambda logits: relaxed_moments(logits, strings, pooled, None).mean,
    }
    found += [_follow(name, "mean", field, pool, start, time) for name, field in fields.items()]
    short = dataclasses.replace(subjects.smooth, texts=subjects.smooth.texts[:, :SMOOTH_LENGTH])
    return found + _smooth_flows(short, start[:, : SMOOTH_LENGTH - 1], time)


def _score_field(strings: Bool[Array, "strings length"], returns: Float[Array, "texts strings decisions"]) -> Field:
    return lambda logits: score_moments(logits, strings, returns).mean


def _smooth_flows(subject: Subject, start: Float[Array, "texts decisions"], time: float) -> list[Flow]:
    """Dynamic chunking, whose likelihoods move with the probabilities, so that the model runs at every step."""
    unweighted = with_chunker(subject, SelectSmooth(weighting="none"))
    strings = subject.strings
    # Certain boundaries smooth nothing: what a string is worth once a policy has settled on it.
    certain = tabulate_certain(unweighted)
    ground = landscape(certain, strings)

    def exact(logits: Float[Array, "texts decisions"]) -> Float[Array, "texts decisions"]:
        return exact_gradient(logits, tabulate(unweighted, logits), strings)

    def chunking(likelier: bool) -> Field:
        return lambda logits: pathwise_moments(logits, strings, tabulate(subject, logits), likelier).mean

    return [
        _follow("exact gradient", "smooth", exact, ground, start, time, moving=unweighted),
        _follow("dynamic chunking, likelier actions", "smooth", chunking(True), ground, start, time, moving=unweighted),
        _follow("dynamic chunking, drawn actions", "smooth", chunking(False), ground, start, time, moving=unweighted),
    ]


def tabulate_certain(subject: Subject) -> Tables:
    """The tables of a chunker that reads probabilities, every string read as certain of itself."""
    strings = subject.strings

    def one(text: Array) -> Array:
        bytes = jnp.broadcast_to(text, strings.shape)
        model = with_logits(subject.model, jnp.where(strings, 20.0, -20.0))
        return next_byte_log_lik(model(bytes, actions=(strings,), training=True).logits, bytes)[:, :-1]

    log_lik = jax.lax.map(one, subject.texts)
    zeros = jnp.zeros((*log_lik.shape[:2], strings.shape[1] - 1))
    return Tables(log_lik, zeros[:, 0], zeros[:, 0, :, None], zeros, zeros)


def _follow(
    name: str,
    model: str,
    field: Field,
    ground: Landscape,
    start: Float[Array, "texts decisions"],
    time: float,
    moving: Subject | None = None,
) -> Flow:
    """Integrate the flow and read off where it went. `moving`: the losses change with the logits, so tabulate them anew."""

    @jax.jit
    def solve(start: Float[Array, "texts decisions"]) -> tuple[Array, Array]:
        terms = diffrax.ODETerm(lambda t, logits, args: -(field(logits) + ground.charge(logits)))
        # Thresholded actions make the field jump, and a step that adapts to that would shrink to nothing.
        adaptive = diffrax.PIDController(rtol=1e-3, atol=1e-3)
        solution = diffrax.diffeqsolve(
            terms,
            diffrax.Tsit5() if moving is None else diffrax.Heun(),
            t0=0.0,
            t1=time,
            dt0=time / (1000 if moving is None else 300),
            y0=start,
            stepsize_controller=adaptive if moving is None else diffrax.ConstantStepSize(),
            # Rounding must not carry the last time past the end.
            saveat=diffrax.SaveAt(ts=jnp.minimum(jnp.geomspace(time / 1000, time, SAVED), time)),
            max_steps=4096,
        )
        assert solution.ts is not None
        assert solution.ys is not None
        return solution.ts, solution.ys

    times, path = solve(start)
    times, path = jnp.concatenate([jnp.zeros(1), times]), jnp.concatenate([start[None], path])

    def losses(logits: Float[Array, "texts decisions"]) -> Float[Array, "texts strings"]:
        if moving is None:
            return ground.losses
        drawn = jnp.mean(ground.strings[:, 1:], axis=1)
        return -jnp.mean(tabulate(moving, logits).log_lik, axis=2) + ground.price * drawn

    return _read_off(name, model, times, path, ground, losses)


def _read_off(
    name: str,
    model: str,
    times: Float[Array, " saved"],
    path: Float[Array, "saved texts decisions"],
    ground: Landscape,
    losses: Callable[[Array], Array],
) -> Flow:
    """A trajectory's losses, and how good the policy at its end is."""

    def expected(logits: Float[Array, "texts decisions"]) -> Float[Array, ""]:
        return jnp.mean(jnp.sum(string_probs(logits, ground.strings) * losses(logits), axis=1))

    curve = [float(value) for value in jax.lax.map(expected, path)]
    last = path[-1]
    place = 2 ** jnp.arange(last.shape[1] - 1, -1, -1)
    chosen = jnp.sum(jnp.where(last > 0, place, 0), axis=1)
    # What the likelier string is worth to a policy that is certain of it.
    likelier = float(jnp.mean(jnp.take_along_axis(ground.losses, chosen[:, None], axis=1)))
    best = float(jnp.mean(ground.best))
    return Flow(
        name=name,
        model=model,
        times=tuple(np.asarray(times).tolist()),
        losses=tuple(curve),
        start=curve[0],
        end=curve[-1],
        likelier=likelier,
        best=best,
        rate=float(jnp.mean(jax.nn.sigmoid(last))),
        closed=(curve[0] - likelier) / (curve[0] - best),
    )


def noisy_flows(subject: Subject, *, time: float, rates: tuple[float, ...], key: PRNGKeyArray) -> list[Flow]:
    r"""The same for finite learning rates η: $d\theta = -E[\hat g]\,dt + \sqrt{\eta\,\mathrm{Cov}[\hat g]}\,dW$.

    Steps of length η make it stochastic gradient descent with Gaussian noise of the estimator's own covariance.
    """
    start = start_of(subject)
    plain, strings = tabulate(subject, start), subject.strings
    ground = landscape(plain, strings)
    raw, early = plain.log_lik, plain.log_lik - plain.early_log_lik[:, None]
    critic = linear_critic(start, plain, strings, credit(early, 0.99))
    undiscounted, far, near = (credit(early, discount) for discount in (1.0, 0.99, 0.9))
    plainest = credit(raw, 1.0)
    estimators: dict[str, Callable[[Array], Moments]] = {
        "nothing": lambda logits: score_moments(logits, strings, plainest),
        "early exit": lambda logits: score_moments(logits, strings, undiscounted),
        "early exit, γ = .99, batch centring": lambda logits: score_moments(logits, strings, far, centring="batch"),
        "early exit, γ = .9, batch centring": lambda logits: score_moments(logits, strings, near, centring="batch"),
        "early exit, γ = .99, linear critic": lambda logits: score_moments(logits, strings, far, baseline=critic),
    }
    found = []
    for rate in rates:
        for number, (name, moments) in enumerate(estimators.items()):
            found.append(wander(name, moments, ground, start, time, rate, jax.random.fold_in(key, number)))
    return found


def wander(
    name: str,
    moments: Callable[[Array], Moments],
    ground: Landscape,
    start: Float[Array, "texts decisions"],
    time: float,
    rate: float,
    key: PRNGKeyArray,
) -> Flow:
    """One path of the stochastic flow."""

    def drift(t: Array, logits: Float[Array, "texts decisions"], args: None) -> Float[Array, "texts decisions"]:
        return -(moments(logits).mean + ground.charge(logits))

    def diffusion(t: Array, logits: Float[Array, "texts decisions"], args: None) -> lx.AbstractLinearOperator:
        values, vectors = jnp.linalg.eigh(moments(logits).covariance)
        roots = vectors * jnp.sqrt(jnp.maximum(values, 0.0) * rate)[:, None, :]
        return lx.FunctionLinearOperator(
            lambda noise: jnp.einsum("tde,te->td", roots, noise), jax.ShapeDtypeStruct(start.shape, start.dtype)
        )

    steps = round(time / rate)

    @jax.jit
    def solve(start: Float[Array, "texts decisions"], key: PRNGKeyArray) -> Float[Array, "saved texts decisions"]:
        noise = diffrax.UnsafeBrownianPath(start.shape, key)
        solution = diffrax.diffeqsolve(
            diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, noise)),
            diffrax.Euler(),
            t0=0.0,
            t1=time,
            dt0=time / steps,
            y0=start,
            saveat=diffrax.SaveAt(ts=jnp.minimum(jnp.linspace(time / SAVED, time, SAVED), time)),
            max_steps=steps + 2,
            adjoint=diffrax.DirectAdjoint(),
        )
        assert solution.ys is not None
        return solution.ys

    times = jnp.linspace(0.0, time, SAVED + 1)
    path = jnp.concatenate([start[None], solve(start, key)])
    return _read_off(f"{name}, η = {rate:g}", "distribute", times, path, ground, lambda logits: ground.losses)
