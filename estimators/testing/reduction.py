"""The clauses that every variance reduction keeps."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from estimators.base import Boundaries, ObjectiveInputs, trainable
from estimators.lookup import Part, construct
from estimators.objectives import AbstractReduction, Credit
from estimators.sections import REDUCTIONS
from estimators.testing.subject import alike, moved, program, require

LENGTH, SECOND = 10, 6
"""Positions of a row; where the second document of row 1 begins."""


@program
def reduced(reduction: AbstractReduction, credit: Credit, inputs: ObjectiveInputs) -> Credit:
    return reduction(credit, inputs)


@program
def gradient(reduction: AbstractReduction, credit: Credit, inputs: ObjectiveInputs) -> tuple[AbstractReduction, Array]:
    """The gradients of its loss to its own parameters and to the loss before it."""
    trains, fixed = eqx.partition(reduction, trainable(reduction))

    def loss(both: tuple[AbstractReduction, Float[Array, ""]]) -> Float[Array, ""]:
        return eqx.combine(both[0], fixed)(dataclasses.replace(credit, loss=both[1]), inputs).loss

    return jax.grad(loss)((trains, credit.loss))


def _inputs(seed: int, dim: int, samples: int, early: bool) -> ObjectiveInputs:
    """Two sequences, the second of two documents, each `samples` times."""
    keys, shape = jax.random.split(jax.random.key(seed), 6), (2 * samples, LENGTH)
    starts = jnp.zeros(shape, bool).at[:, 0].set(True).at[samples:, SECOND].set(True)
    logits = jax.random.normal(keys[0], shape, jnp.float32)
    actions = (jax.random.uniform(keys[1], shape, jnp.float32) < 0.4) | starts
    other = -jax.random.uniform(keys[2], shape, jnp.float32)
    boundaries = Boundaries(actions, logits, jax.nn.sigmoid(logits), ~starts, starts, None, other)
    scored = jnp.ones(shape, bool).at[:, -1].set(False).at[samples:, SECOND - 1].set(False)
    rewards, early_rewards = (jnp.where(scored, -jax.random.uniform(key, shape, jnp.float32), 0.0) for key in keys[3:5])
    hidden = jax.random.normal(keys[5], (*shape, dim), jnp.float32)
    return ObjectiveInputs(
        boundaries, hidden, rewards, early_rewards if early else None, scored, scored, samples=samples
    )


def check_reduction(subject: AbstractReduction | type, *, dim: int = 32, samples: int = 1, seed: int = 0) -> None:
    """Raises `ContractError`, with the clause and what was seen, unless a reduction keeps its contract.

    Rewards and returns keep their shape and stay finite float32; returns depend on no earlier reward of their row and on no
    other document of it; a step adds its loss to that of the steps before and keeps their weights; it trains its own parameters;
    it needs the early exit only if it says so.

    `subject`: a reduction, or a class of one, which is made with its default settings. `dim`: the width of hidden states that it
    was built for; `samples`: draws for each sequence, if it compares several. Raises `TypeError` for anything else.
    """
    if isinstance(subject, type):
        given = {"dim": dim, "key": jax.random.key(seed), "target_rate": 0.3}
        made = construct(Part(REDUCTIONS, subject.__name__, subject), {}, given)
    else:
        made = subject
    if not isinstance(made, AbstractReduction):
        raise TypeError(f"what is checked must be a reduction; got a {type(made).__name__}")
    reduction = moved(made, jax.random.key(seed + 1))
    inputs = _inputs(seed, dim, samples, reduction.needs_early_exit)
    credit = Credit(inputs.log_prob, None, jnp.asarray(1.0, jnp.float32), None)
    found = reduced(reduction, credit, inputs)
    _check_values(found, inputs)
    _check_past(reduction, found, credit, inputs, samples)
    _check_loss(reduction, credit, inputs)
    weights = jnp.exp(0.1 * inputs.boundaries.logits)
    try:
        kept = reduced(reduction, dataclasses.replace(credit, weights=weights), inputs).weights
    except ValueError:
        return  # It refuses credit that is weighted already.
    contract = "A step keeps the importance weights of the steps before it."
    require(
        kept is not None and np.allclose(kept, weights), contract, "They came out changed: use dataclasses.replace."
    )


def _check_values(found: Credit, inputs: ObjectiveInputs) -> None:
    require(isinstance(found, Credit), "A reduction returns Credit.", f"It returned a {type(found).__name__}.")
    shape = inputs.log_prob.shape
    for name, expected in (("rewards", shape), ("returns", shape), ("weights", shape), ("loss", ())):
        value = getattr(found, name)
        if value is None and name in ("returns", "weights"):
            continue
        contract = "Rewards, returns, weights and the loss are finite float32; all but the loss are rows x positions."
        require(
            (value.dtype, value.shape) == (jnp.float32, expected), contract, f"{name}: {value.dtype} {value.shape}."
        )
        require(jnp.all(jnp.isfinite(value)), contract, f"{name} are not finite.")


def _check_past(
    reduction: AbstractReduction, found: Credit, credit: Credit, inputs: ObjectiveInputs, samples: int
) -> None:
    """Other rewards before a place, in one row, change no return from it on."""
    old = found.summed(inputs)
    for row, place in ((0, 5), (samples, SECOND)):
        earlier: Bool[Array, " length"] = (jnp.arange(LENGTH) < place) & inputs.mask[row]
        rewards = credit.rewards.at[row].add(jnp.where(earlier, -3.0, 0.0))
        seen = dataclasses.replace(inputs, log_prob=rewards)
        new = reduced(reduction, dataclasses.replace(credit, rewards=rewards), seen).summed(seen)
        contract = "The return of an action depends on no reward before it, nor on another document of its row."
        where = jnp.zeros(old.shape, bool).at[row, place:].set(True)
        alike(contract, f"Rewards before position {place} moved that", old, new, where)
    later: Bool[Array, " length"] = (jnp.arange(LENGTH) >= SECOND) & inputs.mask[samples]
    rewards = credit.rewards.at[samples].add(jnp.where(later, -3.0, 0.0))
    seen = dataclasses.replace(inputs, log_prob=rewards)
    new = reduced(reduction, dataclasses.replace(credit, rewards=rewards), seen).summed(seen)
    contract = "The return of an action depends on no other document of its row."
    where = jnp.zeros(old.shape, bool).at[samples, :SECOND].set(True)
    alike(contract, "Rewards of the document behind it moved that", old, new, where)


def _check_loss(reduction: AbstractReduction, credit: Credit, inputs: ObjectiveInputs) -> None:
    own, before = gradient(reduction, credit, inputs)
    require(np.allclose(before, 1.0), "A step adds its loss to that of the steps before.", "Theirs was lost or scaled.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(own):
        name = jax.tree_util.keystr(path)
        require(jnp.all(jnp.isfinite(leaf)), "Gradients of the loss are finite.", f"That of {name} is not.")
        contract = "A step trains its own parameters by its own loss."
        require(jnp.any(leaf), contract, f"{name} gets no gradient.")
