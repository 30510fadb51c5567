"""The clause of constraints: no boundary where they forbid one, one wherever they force it, and no policy term at either."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from estimators.base import AbstractRouter, Boundaries, Layout, SamplingOptions
from estimators.constraints import MaxLength, MinLength, WholeCharacters
from estimators.equations import NEVER
from estimators.limits import Limits
from estimators.routers.constrained import AbstractConstraint, Constrained
from estimators.testing.subject import (
    DEFAULT,
    LENGTH,
    ROWS,
    SECOND,
    Setup,
    Subject,
    Text,
    carries,
    first,
    model_of,
    program,
    require,
)
from unet.ops import boundary_scan

TRIED = (WholeCharacters(), MaxLength(5), MinLength(2))
"""What estimators without constraints are tried with."""


@program
def limits_of(constraint: AbstractConstraint, layout: Layout) -> Limits:
    return constraint.limits(layout)


class Tried(eqx.Module):
    """The boundaries drawn in each of `MODES`, the log-odds of the same actions where they are given, the limits, and the
    gradient, with respect to the states, of what is said of constrained positions in training."""

    drawn: tuple[Boundaries, ...]
    again: tuple[Float[Array, "batch length"], ...]
    limits: Limits
    gradient: Float[Array, "batch length dim"]


MODES = ("in training", "with a key for each row", "without a key")


@program
def tried(
    router: AbstractRouter,
    own: Constrained,
    hidden: Float[Array, "batch length dim"],
    layout: Layout,
    key: PRNGKeyArray,
    keys: Key[Array, " batch"],
) -> Tried:
    """All in one program, which takes a fraction of the time to compile of one for each."""
    modes = [SamplingOptions(boundary_scan, one, training=one is key) for one in (key, keys, None)]
    drawn = [router(hidden, layout, options) for options in modes]
    given = [dataclasses.replace(mode, actions=one.actions) for mode, one in zip(modes, drawn, strict=True)]
    again = [router(hidden, layout, options).logits for options in given]

    def said(hidden: Float[Array, "batch length dim"]) -> Float[Array, ""]:
        found = router(hidden, layout, modes[0])
        values = [found.logits, found.probs, *([] if found.relaxed is None else [found.relaxed])]
        held = jnp.zeros_like(layout.mask) if found.constrained is None else found.constrained
        return sum((jnp.sum(jnp.where(held, one, 0.0)) for one in values), jnp.zeros(()))

    return Tried(tuple(drawn), tuple(again), own.limits(layout), jax.grad(said)(hidden))


def check_constraints(subject: Subject, setup: Setup = DEFAULT) -> None:
    """Where constraints forbid a boundary there is none, and one wherever they force it, in training, with a key for each row and
    without one. Nothing is `decided` there, and what is said of these positions is certain and carries no gradient. Elsewhere the
    log-odds are those that the router gives to the actions that stand. Limits depend on bytes that constraints may read.

    An estimator without constraints is tried with some: a router that draws for itself what depends on its own past breaks here.
    """
    model, text = model_of(subject, setup), Text.cut(setup)
    router = model.stage.estimators[0].router
    inside = jax.tree.leaves(router, is_leaf=lambda part: isinstance(part, Constrained))
    own = next((part for part in inside if isinstance(part, Constrained)), None)
    for constraint in own.constraints if own is not None else ():
        _check_limits(constraint, text, Text.cut(setup, 1))
    if own is None:
        router = own = Constrained(router, TRIED)
    hidden = jax.random.normal(setup.key(4), (ROWS, LENGTH, model.embedding.shape[1]), jnp.float32)
    found = tried(router, own, hidden, text.layout, setup.key(0), setup.keys)
    for when, drawn, again in zip(MODES, found.drawn, found.again, strict=True):
        _check_held(drawn, found.limits, text.layout, when)
        contract = (
            "The log-odds are those of the actions that stand, after constraints: a router whose log-odds depend on earlier "
            "actions draws with `options.sampler` and hands it `options.limits`."
        )
        wrong = np.asarray(drawn.decided) & ~(np.abs(np.asarray(again) - np.asarray(drawn.logits)) < 1e-3)
        require(not wrong.any(), contract, f"They are others {when} {first(wrong)}.")
    reached = carries(np.max(np.abs(np.asarray(found.gradient)), axis=-1))
    contract = "No gradient flows from where a boundary is forced or forbidden."
    require(not reached.any(), contract, f"One reached a state {first(reached)}.")


def _check_held(drawn: Boundaries, limits: Limits, layout: Layout, when: str) -> None:
    """What stands, against a loop over the positions."""
    actions, least, most, starts, mask = (
        np.asarray(one) for one in (drawn.actions, limits.least, limits.most, layout.starts, layout.mask)
    )
    forced, forbidden = np.zeros_like(actions), np.zeros_like(actions)
    for row in range(ROWS):
        size = 0
        for place in range(LENGTH):
            size = 1 if starts[row, place] else size + 1
            forbidden[row, place] = size < least[row, place]
            forced[row, place] = not forbidden[row, place] and size >= most[row, place]
            size = 0 if actions[row, place] else size
    free = mask & ~starts
    forced, forbidden = forced & free, forbidden & free
    held, decided, probs = forced | forbidden, np.asarray(drawn.decided), np.asarray(drawn.probs)
    said = held if drawn.constrained is None else np.asarray(drawn.constrained)
    clauses = (
        ("No boundary stands where a constraint forbids it.", actions & forbidden, "One does"),
        ("A boundary stands wherever a constraint forces it.", forced & ~actions, "None does"),
        ("`constrained` marks where a constraint forced or forbade a boundary.", said != held, "It does not"),
        ("Nothing is `decided` where a constraint did it.", decided & held, "It is"),
        ("What a constraint did is certain: its probability is 0 or 1.", held & (probs != actions), "It is not"),
    )
    for contract, wrong, seen in clauses:
        require(not wrong.any(), contract, f"{seen} {when} {first(wrong)}.")


def _check_limits(constraint: AbstractConstraint, text: Text, other: Text) -> None:
    """Form, and what limits may depend on."""
    name, reach = type(constraint).__name__, constraint.reach
    found = limits_of(constraint, text.layout)
    for field in ("least", "most"):
        value = getattr(found, field)
        seen = f"{getattr(value, 'dtype', type(value).__name__)} {getattr(value, 'shape', '')}"
        contract = "The limits of a constraint are int32 arrays, rows x positions."
        require(seen == f"int32 {(ROWS, LENGTH)}", contract, f"The {field} of {name} is {seen}.")
    for value in () if found.sized else (found.least, found.most):
        wrong = ~np.isin(np.asarray(value), (1, NEVER))
        contract = "Limits that are not `sized` are 1 or NEVER."
        require(not wrong.any(), contract, f"One of {name} is {np.asarray(value)[wrong][:1]} {first(wrong)}.")

    def both(limits: Limits) -> Int[np.ndarray, "two batch length"]:
        return np.stack([np.asarray(limits.least), np.asarray(limits.most)])

    own, places = np.asarray(text.bytes), np.arange(LENGTH)
    for place in range(1, LENGTH):
        bytes = own.copy()
        bytes[:, place] = np.where(other.bytes[:, place] == own[:, place], 0xE6, other.bytes[:, place])
        changed = limits_of(constraint, Text(jnp.asarray(bytes), text.segments, text.mask).layout)
        may = (places >= place) & (places <= place + reach)
        same_document = np.asarray(text.segments) == np.asarray(text.segments)[:, place : place + 1]
        moved: Bool[np.ndarray, "batch length"] = np.any(both(found) != both(changed), axis=0)
        wrong = moved & ~(may & same_document) & np.asarray(text.mask)
        contract = (
            f"Limits depend on the byte at the position and the {reach} before it in its document (`reach`) only."
        )
        require(not wrong.any(), contract, f"Another byte {place} moved those of {name} {first(wrong)}.")
    size = LENGTH - SECOND
    alone, among = both(limits_of(constraint, text.second_alone.layout)), both(found)
    wrong = np.any(alone[:, :1, :size] != among[:, 1:2, SECOND:], axis=0)
    contract = "Documents packed into one row do not depend on each other, nor on where in the row they begin."
    require(not wrong.any(), contract, f"The limits of {name} are others behind another document.")
