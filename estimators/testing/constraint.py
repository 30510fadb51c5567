"""The clause of constraints: no boundary where they forbid one, one wherever they force it, and no policy term at either."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from estimators.base import AbstractRouter, Boundaries, Layout, SamplingOptions
from estimators.constraints import Characters, MaxLength, MinLength
from estimators.equations import NEVER
from estimators.limits import Limits
from estimators.routers.constrained import AbstractConstraint, Constrained
from estimators.testing.programs import route
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

TRIED = (Characters(), MaxLength(5), MinLength(2))
"""What estimators without constraints are tried with."""


@program
def limits_of(constraint: AbstractConstraint, layout: Layout) -> Limits:
    return constraint.limits(layout)


@program
def pull_of_held(
    router: AbstractRouter, hidden: Float[Array, "batch length dim"], layout: Layout, key: PRNGKeyArray
) -> Float[Array, "batch length dim"]:
    """The gradient, with respect to the states, of what is said of constrained positions."""

    def said(hidden: Float[Array, "batch length dim"]) -> Float[Array, ""]:
        drawn = router(hidden, layout, SamplingOptions(boundary_scan, key, training=True))
        values = [drawn.logits, drawn.probs, *([] if drawn.relaxed is None else [drawn.relaxed])]
        held = jnp.zeros_like(layout.mask) if drawn.constrained is None else drawn.constrained
        return sum((jnp.sum(jnp.where(held, one, 0.0)) for one in values), jnp.zeros(()))

    return jax.grad(said)(hidden)


def check_constraints(subject: Subject, setup: Setup = DEFAULT) -> None:
    """Where constraints forbid a boundary there is none, and one wherever they force it, in training, with a key for each row and
    without one. Nothing is `decided` there, and what is said of these positions is certain and carries no gradient. Elsewhere the
    log-odds are those that the router gives to the actions that stand. Limits depend on bytes that constraints may read.

    An estimator without constraints is tried with some: a router that draws for itself what depends on its own past breaks here.
    """
    model, text = model_of(subject, setup), Text.cut(setup)
    router = model.stage.estimators[0].router
    router = router if isinstance(router, Constrained) else Constrained(router, TRIED)
    for constraint in router.constraints:
        _check_limits(constraint, text, Text.cut(setup, 1))
    shape = (ROWS, LENGTH, model.embedding.shape[1])
    hidden = jax.random.normal(setup.key(4), shape, jnp.float32)
    limits = program(Constrained.limits)(router, text.layout)
    modes = {"in training": (setup.key(0), True), "with a key for each row": (setup.keys, False)}
    for when, (key, training) in {**modes, "without a key": (None, False)}.items():
        drawn = route(router, hidden, text.layout, key, None, training)
        _check_held(drawn, limits, text.layout, when)
        again = route(router, hidden, text.layout, key, drawn.actions, training)
        apart = np.abs(np.asarray(again.logits) - np.asarray(drawn.logits))
        contract = (
            "The log-odds are those of the actions that stand, after constraints: draw with `options.sampler` and \
`options.limits` where they depend on earlier actions."
        )
        wrong = np.asarray(drawn.decided) & ~(apart < 1e-3)
        require(not wrong.any(), contract, f"They are others {when} {first(wrong)}.")
    reached = carries(np.max(np.abs(np.asarray(pull_of_held(router, hidden, text.layout, setup.key(0)))), axis=-1))
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
