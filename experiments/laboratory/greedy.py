r"""Greedy boundaries: a deterministic loss, and its gradient averaged over a neighbourhood.

The loss of greedy boundaries, $J(l)$, is that of the string $1[l > 0]$ whose probabilities are read from the same logits. It
jumps where a logit passes 0. Almost everywhere its gradient is that at fixed boundaries, which does not see the jumps; it is
0 if the chunker reads no probabilities. The effect of moving the logits appears only in an average,
$J_s(l) = E[J(l + s\varepsilon)]$ with standard logistic ε.
"""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from experiments.laboratory.subjects import RATE, PerDecision, Subject, with_logits
from unet import next_logprobs

SPREAD = 0.5
"""Standard deviation of the logits at which estimators are examined."""

Loss = Callable[[Float[Array, "tries decisions"], Bool[Array, "tries decisions"]], Float[Array, " tries"]]
"""The mean loss of one text, in nats, for several tries of logits and actions of its decisions."""


def greedy_start(key: PRNGKeyArray, shape: tuple[int, ...]) -> PerDecision:
    """Logits whose greedy boundaries come at the rate `RATE`: normal, with the mean that leaves so many above 0."""
    return SPREAD * (jax.scipy.special.ndtri(RATE) + jax.random.normal(key, shape))


def loss_of(subject: Subject, text: Int[Array, " length"]) -> Loss:
    """The loss of a text under a subject's model."""

    def loss(
        logits: Float[Array, "tries decisions"], actions: Bool[Array, "tries decisions"]
    ) -> Float[Array, " tries"]:
        bytes = jnp.broadcast_to(text, (len(logits), len(text)))
        model = with_logits(subject.model, jnp.pad(logits, ((0, 0), (1, 0))))
        drawn = jnp.pad(actions, ((0, 0), (1, 0)), constant_values=True)
        prediction = model(bytes, actions=(drawn,), training=True)
        return -jnp.mean(next_logprobs(prediction.logits, bytes)[:, :-1], axis=1)

    return loss


def fixed_gradient(loss: Loss, logits: Float[Array, "tries decisions"]) -> Float[Array, "tries decisions"]:
    """The derivative at greedy boundaries held fixed, of each try.

    With a chunker that weighs by confidence straight through this is dynamic chunking's estimator; with one that doesn't, the
    gradient of the greedy loss almost everywhere.
    """
    return jax.grad(lambda moved: jnp.sum(loss(moved, logits > 0)))(logits)


def jumps(
    loss: Loss, logits: Float[Array, " decisions"], noise: Float[Array, "samples decisions"], scale: Float[Array, ""]
) -> Float[Array, " decisions"]:
    r"""What the gradient at fixed boundaries leaves out of $\nabla J_s$, for one text.

    $f_s(-l_d)\,E[J(\text{on}) - J(\text{off})]$ for decision d, its logit at 0 and its boundary on or off, the others where the
    noise puts them: $f_s(x) = \sigma(x/s)\,\sigma(-x/s)/s$ is the density with which the noise reaches the threshold.
    """
    decisions = len(logits)
    moved = logits + scale * noise
    # samples decisions decisions: for every decision d a copy whose logit d lies on the threshold
    at = jnp.where(jnp.eye(decisions, dtype=bool), 0.0, moved[:, None, :])
    on = (at > 0) | jnp.eye(decisions, dtype=bool)
    rows = at.reshape(-1, decisions)
    change = loss(rows, on.reshape(-1, decisions)) - loss(rows, (at > 0).reshape(-1, decisions))
    density = jax.nn.sigmoid(logits / scale) * jax.nn.sigmoid(-logits / scale) / scale
    return density * jnp.mean(change.reshape(len(noise), decisions), axis=0)


class Neighbourhood(eqx.Module):
    """Averages over a neighbourhood of the logits: of dynamic chunking's estimator, and the gradient of the averaged loss."""

    estimator: Float[Array, "*texts decisions"]
    gradient: Float[Array, "*texts decisions"]


@eqx.filter_jit
def neighbourhood(
    weighted: Subject,
    unweighted: Subject,
    logits: PerDecision,
    key: PRNGKeyArray,
    *,
    scale: Float[Array, ""],
    samples: int,
) -> Neighbourhood:
    """Both, from the same `samples` draws of logistic noise.

    `weighted` has the chunker whose estimator it is, `unweighted` the same without the straight-through weight, whose value
    is 1 and whose gradient is no derivative of the loss.
    """
    noise = jax.random.logistic(key, (samples, *logits.shape))

    def one(
        part: tuple[Int[Array, " length"], Float[Array, " decisions"], Float[Array, "samples decisions"]],
    ) -> Neighbourhood:
        text, row, noise = part
        moved, loss = row + scale * noise, loss_of(unweighted, text)
        return Neighbourhood(
            jnp.mean(fixed_gradient(loss_of(weighted, text), moved), axis=0),
            jnp.mean(fixed_gradient(loss, moved), axis=0) + jumps(loss, row, noise, scale),
        )

    return jax.lax.map(one, (weighted.texts, logits, jnp.swapaxes(noise, 0, 1)))


@eqx.filter_jit
def at_a_point(subject: Subject, logits: PerDecision) -> PerDecision:
    """`fixed_gradient` of every text at its logits."""
    return jax.lax.map(
        lambda part: fixed_gradient(loss_of(subject, part[0]), part[1][None])[0], (subject.texts, logits)
    )


def greedy_losses(subject: Subject, logits: PerDecision) -> Float[Array, " texts"]:
    """The loss of every text's greedy boundaries."""
    return jax.lax.map(
        lambda part: loss_of(subject, part[0])(part[1][None], part[1][None] > 0)[0], (subject.texts, logits)
    )
