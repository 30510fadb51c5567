"""The clauses that every estimator keeps, one function each, run in a small model."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import types
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float
from scipy.special import expit

from estimators.base import (
    AbstractChunker,
    Boundaries,
    SamplingOptions,
)
from estimators.constraints import CONSTRAINTS
from estimators.lookup import Part, construct, find
from estimators.routers.constrained import AbstractConstraint
from estimators.testing.chunker import check_chunker
from estimators.testing.constraint import check_constraints
from estimators.testing.programs import (
    TIGHT,
    decode,
    loss_gradient,
    predict,
    predict_given,
    pull,
    route,
    router_gradient,
)
from estimators.testing.subject import (
    DEFAULT,
    LENGTH,
    ROWS,
    SECOND,
    Setup,
    Subject,
    Text,
    alike,
    carries,
    first,
    model_of,
    require,
)
from unet.decoding.kv_cache import with_room
from unet.files.saving import LoadError, load, save
from unet.losses import Prediction
from unet.model import UNet
from unet.ops import boundary_scan


def states(model: UNet, setup: Setup, dtype: DTypeLike = jnp.float32) -> Float[Array, "batch length dim"]:
    """Hidden states as wide as the outermost level's."""
    shape = (ROWS, LENGTH, model.embedding.shape[1])
    return jax.random.normal(setup.key(4), shape, jnp.float32).astype(dtype)


def fields(prediction: Prediction) -> dict[str, np.ndarray]:
    """What was drawn at the outermost level, and what was predicted, by name."""
    drawn = prediction.levels[0].boundaries
    found = {"actions": drawn.actions, "probabilities": drawn.probs, "log-odds": drawn.logits}
    return {name: np.asarray(values) for name, values in {**found, "predictions": prediction.logits}.items()}


FORM = "The boundaries of a router are arrays of the shape rows x positions: bool actions, decided and starts; float32 others."


def _check_form(boundaries: Boundaries, when: str) -> None:
    """Shapes and dtypes; `boundaries` may hold shapes in place of arrays."""
    require(
        isinstance(boundaries, Boundaries),
        "A router returns Boundaries.",
        f"This one returned {type(boundaries).__name__}.",
    )
    for field in dataclasses.fields(Boundaries):
        value = getattr(boundaries, field.name)
        if value is None and field.name in ("relaxed", "behaviour_log_prob", "constrained", "settled"):
            continue
        truth = field.name in ("actions", "decided", "starts", "constrained", "settled")
        expected = f"{'bool' if truth else 'float32'} {(ROWS, LENGTH)}"
        seen = f"{getattr(value, 'dtype', type(value).__name__)} {getattr(value, 'shape', '')}"
        require(seen == expected, FORM, f"Its {field.name} {when} are {seen}, not {expected}.")


def check_shapes(subject: Subject, setup: Setup = DEFAULT) -> None:
    """Boundaries have the shape of the positions and their dtypes, also from bfloat16 states; logits are finite."""
    model, text = model_of(subject, setup), Text.cut(setup)
    router = model.stage.estimators[0].router
    options = SamplingOptions(boundary_scan, setup.key(0), training=True)
    shapes = eqx.filter_eval_shape(router, states(model, setup, jnp.bfloat16), text.layout, options)
    _check_form(shapes, "from bfloat16 states")
    logits = predict(model, text, setup.keys).logits
    form = "The logits of the model around it are finite float32, rows x positions x 256."
    require((logits.dtype, logits.shape) == (jnp.float32, (ROWS, LENGTH, 256)), form, f"{logits.dtype} {logits.shape}.")
    require(jnp.all(jnp.isfinite(logits)), form, f"They are {np.asarray(logits)[~np.isfinite(logits)][:1]}.")


def check_boundaries(subject: Subject, setup: Setup = DEFAULT) -> None:
    """A boundary is forced where a document starts and none stands on padding, in training, evaluation and decoding; `decided`
    marks positions where a policy chose; `probs` are the sigmoid of `logits`; without a key the likelier action is taken; given
    actions are taken as they are."""
    model, text = model_of(subject, setup), Text.cut(setup)
    given = text.plain.some_actions
    modes = {
        "in training": (setup.key(0), None, True),
        "with a key for each row": (setup.keys, None, False),
        "without a key": (None, None, False),
        "with given actions": (None, given, False),
    }
    starts, mask = (np.asarray(one) for one in (text.layout.starts, text.mask))
    for when, (key, actions, training) in modes.items():
        drawn = route(model.stage.estimators[0].router, states(model, setup), text.layout, key, actions, training)
        _check_form(drawn, when)
        _check_drawn(drawn, starts, mask, when)
        found = np.asarray(drawn.actions)
        if when == "without a key":
            wrong = (found != (np.asarray(drawn.probs) > 0.5)) & mask & ~starts
            contract = "Without a key a boundary is drawn exactly where its probability is above 1/2."
            require(not wrong.any(), contract, f"It is not {first(wrong)}.")
        if actions is not None:
            wrong = found != ((np.asarray(actions) | starts) & mask)
            contract = "Given actions are taken as they are, but for starts of documents and padding."
            require(not wrong.any(), contract, f"They are not {first(wrong)}.")


def _check_drawn(
    drawn: Boundaries, starts: Bool[np.ndarray, "batch length"], mask: Bool[np.ndarray, "batch length"], when: str
) -> None:
    """What holds of all boundaries, however they were drawn."""
    actions, decided, logits, probs = (
        np.asarray(one) for one in (drawn.actions, drawn.decided, drawn.logits, drawn.probs)
    )
    relaxed = actions if drawn.relaxed is None else np.asarray(drawn.relaxed)
    of_other = np.zeros(mask.shape) if drawn.behaviour_log_prob is None else np.asarray(drawn.behaviour_log_prob)
    apart = np.abs(expit(logits) - probs)
    clauses = (
        ("A boundary is forced where a document starts.", starts & ~actions, "There is none"),
        ("No boundary stands on padding.", actions & ~mask, "There is one"),
        ("The `starts` of boundaries are those of the layout.", np.asarray(drawn.starts) != starts, "They are not"),
        ("Nothing is `decided` on padding or where a boundary is forced.", decided & (starts | ~mask), "It is"),
        ("Log-odds and probabilities are finite.", mask & ~np.isfinite(logits + probs), "They are not"),
        ("Probabilities lie between 0 and 1.", mask & ((probs < 0) | (probs > 1)), "One does not"),
        ("Probabilities are the sigmoid of the log-odds, to 0.001.", mask & ~(apart < 1e-3), "They are not"),
        ("`relaxed` has the values of the actions.", ~(np.abs(relaxed - 1.0 * actions) < 1e-5), "It does not"),
        ("`behaviour_log_prob` is at most 0.", decided & ~(of_other <= 0), "It is not"),
    )
    for contract, wrong, seen in clauses:
        which = probs[wrong][0] if wrong.any() else 0.0
        require(not wrong.any(), contract, f"{seen} {when} {first(wrong)} (probability {which:.4g}).")


CAUSAL = "What is drawn and predicted at a position may depend on bytes up to it only."


def check_causality(subject: Subject, setup: Setup = DEFAULT) -> None:
    """Other bytes from a position on move nothing before it; the log-odds at a position depend on no action from it on."""
    model, text, other = model_of(subject, setup), Text.cut(setup), Text.cut(setup, 1)
    before = after = predict(model, text, setup.keys)
    own = np.asarray(text.bytes)
    for place in range(1, LENGTH):
        bytes = np.where(np.arange(LENGTH) < place, own, other.bytes)
        bytes[:, place] += bytes[:, place] == own[:, place]
        changed = Text(jnp.asarray(bytes), text.segments, text.mask)
        after = predict(model, changed, setup.keys)
        moved = f"Other bytes from position {place} on moved the"
        old, new = fields(before), fields(after)
        earlier = np.broadcast_to(np.arange(LENGTH) < place, (ROWS, LENGTH))
        for name in old:
            alike(CAUSAL, f"{moved} {name}", old[name], new[name], earlier)
    require(
        not np.allclose(before.logits[0, -1], after.logits[0, -1], atol=1e-5),
        "A prediction depends on the byte at its own position.",
    )
    router, hidden = model.stage.estimators[0].router, states(model, setup)
    given = text.some_actions
    old = route(router, hidden, text.layout, None, given, False)
    decided = np.asarray(old.decided)
    for place in (3, 9, 16):
        new = route(router, hidden, text.layout, None, given.at[:, place].set(~given[:, place]), False)
        contract = "The log-odds at a position may depend on actions before it only."
        seen = f"Another action at position {place} moved them"
        alike(contract, seen, old.logits, new.logits, decided & (np.arange(LENGTH) <= place))


def check_causality_of_gradients(subject: Subject, setup: Setup = DEFAULT) -> None:
    """No gradient flows from what is predicted or drawn at a position to a later one, to another document, or another row."""
    model, text = model_of(subject, setup), Text.cut(setup)
    for row, place, begin in ((0, 9, 0), (1, SECOND + 4, SECOND)):
        gradient = pull(model, text, setup.keys, jnp.asarray(row), jnp.asarray(place))
        reached = carries(np.max(np.abs(np.asarray(gradient)), axis=-1))
        wrong = reached.copy()
        wrong[row, begin : place + 1] = False
        contract = (
            "No gradient may flow from a position to a later one, to another document, or another row of the batch."
        )
        require(not wrong.any(), contract, f"From position {place} of row {row} one reached a state {first(wrong)}.")
        require(reached[row, place], "A gradient reaches a position from its own prediction.", "None did.")


def check_batch(subject: Subject, setup: Setup = DEFAULT) -> None:
    """A row has the same boundaries and predictions, with its own key, among whatever other rows."""
    model, text, others = model_of(subject, setup), Text.cut(setup), Text.cut(setup, 1).plain
    together, keys = predict(model, text, setup.keys), jax.random.split(setup.key(5), ROWS)
    contract = "Rows of a batch do not depend on each other."
    for row in range(ROWS):
        inputs = jax.tree.map(lambda other, own, row=row: other.at[1].set(own[row]), others, text)
        among = predict(model, inputs, keys.at[1].set(setup.keys[row]))
        old, new = (fields(one) for one in (together, among))
        for name in old:
            seen = f"The {name} of row {row} were others among other rows,"
            alike(contract, seen, old[name][row : row + 1], new[name][1:2])


def check_packing(subject: Subject, setup: Setup = DEFAULT) -> None:
    """A document behind another in one row has the boundaries and predictions that it has alone."""
    model, text = model_of(subject, setup), Text.cut(setup)
    router, hidden, size = model.stage.estimators[0].router, states(model, setup), LENGTH - SECOND
    contract = "Documents packed into one row do not depend on each other, nor on where in the row they begin."
    shifted = hidden.at[0, :size].set(hidden[1, SECOND:])
    together = route(router, hidden, text.layout, None, None, False)
    alone = route(router, shifted, text.second_alone.layout, None, None, False)
    for name in ("probs", "logits", "actions"):
        old, new = (np.asarray(getattr(one, name)) for one in (alone, together))
        alike(contract, f"The {name} of a document were others behind another,", old[:1, :size], new[1:2, SECOND:])
    actions = text.some_actions
    packed = predict_given(model, text, actions).logits
    single = predict_given(model, text.second_alone, actions.at[0, :size].set(actions[1, SECOND:])).logits
    seen = "The predictions of a document were others behind another,"
    alike(contract, seen, np.asarray(single)[:1, :size], np.asarray(packed)[1:2, SECOND:])


def check_decoding(subject: Subject, setup: Setup = DEFAULT) -> None:
    """Prefill and steps, however a text is split, draw and predict what one pass over the whole text does."""
    model, bytes = model_of(subject, setup), np.asarray(Text.cut(setup).plain.bytes)
    expected, dice = fields(predict(model, Text.cut(setup).plain, setup.keys)), np.random.default_rng(setup.seed)
    require(
        expected["actions"][:, 1:].any(),
        "Decoding was not checked: no boundary was drawn in the text.",
        "Give a text, or a rate, with which there are some.",
    )
    got = {name: np.zeros_like(values) for name, values in expected.items()}
    done, every, state = np.zeros(ROWS, int), np.arange(ROWS)[:, None], model.init_state(ROWS, setup.keys)
    for width in itertools.chain((LENGTH, 5), itertools.repeat(1)):
        if (done == LENGTH).all():
            break
        some = np.asarray((1, 9, LENGTH - 1)) if width == LENGTH else dice.integers(0, width + 1, ROWS)
        some = np.minimum(some, LENGTH - done)
        place = np.minimum(done[:, None] + np.arange(width), LENGTH - 1)
        prediction, state = decode(model, jnp.asarray(bytes[every, place]), state, jnp.asarray(some))
        state = with_room(state, LENGTH) if width == LENGTH else state
        there, found = np.arange(width) < some[:, None], fields(prediction)
        row, column = np.broadcast_to(every, place.shape)[there], place[there]
        for name, values in found.items():
            got[name][row, column] = values[there]
        wrong = found["actions"] & ~there
        require(not wrong.any(), "No boundary stands on padding.", f"There is one in decoding {first(wrong)}.")
        done = done + some
    contract = "Prefill and steps, with the decode state, give what one pass over the text gives."
    for name, values in expected.items():
        alike(contract, f"The {name} are others", values, got[name], atol=1e-4)


def check_capacity(subject: Subject, setup: Setup = DEFAULT) -> None:
    """Boundaries beyond the capacity are dropped and counted, and no document is left with its neighbour's token."""
    model, text = model_of(subject, setup), Text.cut(setup)
    everywhere = jnp.ones((ROWS, LENGTH), bool)
    tight, free = predict_given(model, text, everywhere), predict(model, text, setup.keys)
    level, count = tight.levels[0], jnp.sum(text.mask, axis=1)
    contract = "Every boundary becomes a token or is counted as overflow."
    require(jnp.all(level.lengths <= TIGHT), contract, f"{TIGHT} tokens had room; there are {level.lengths}.")
    require(
        jnp.array_equal(level.lengths + level.overflow, count), contract, f"Of {count}, {level.overflow} are counted."
    )
    require(
        jnp.array_equal(jnp.sum(level.boundaries.actions, axis=1), level.lengths),
        contract,
        f"{level.lengths} tokens have other numbers of boundaries.",
    )
    require(not jnp.any(free.levels[0].overflow), contract, "Some overflowed where there was no bound.")
    require(level.boundaries.actions[1, SECOND], "Every document keeps the boundary at its start.", "One lost it.")
    changed = Text(text.bytes.at[1, 3].add(1), text.segments, text.mask)
    other = predict_given(model, changed, everywhere)
    contract = "A document without room for its tokens does not read those of another."
    alike(
        contract,
        "Another byte in the document before moved a prediction",
        np.asarray(tight.logits)[1:2, SECOND:],
        np.asarray(other.logits)[1:2, SECOND:],
    )


def check_chunking(subject: Subject, setup: Setup = DEFAULT) -> None:
    """The estimator's chunker keeps its own contract: see `check_chunker`."""
    model = model_of(subject, setup)
    check_chunker(model.stage.estimators[0].chunker, dim=model.embedding.shape[1], seed=setup.seed)


def check_saving(subject: Subject, setup: Setup = DEFAULT) -> None:
    """The model around the estimator can be written to a file, and comes back with the same fields and arrays."""
    model = model_of(subject, setup)
    contract = "A model is saved, as modules, arrays, plain values and named functions, and comes back the same."
    with tempfile.TemporaryDirectory() as folder:
        try:
            save(model, folder)
            back = load(folder, known=tuple(_names(model))).model
        except (ValueError, LoadError) as error:
            require(False, contract, f"Here {error}.")
            return
    require(jax.tree.structure(back) == jax.tree.structure(model), contract, "It came back with other fields.")
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(model), jax.tree.leaves(back), strict=True):
        same = one.dtype == other.dtype and np.array_equal(one, other, equal_nan=jnp.issubdtype(one.dtype, jnp.inexact))
        require(same, contract, f"{jax.tree_util.keystr(path)} came back different.")


def _names(value: object) -> set[type | Callable[..., object]]:
    """The classes and functions that a model is made of."""
    if isinstance(value, types.FunctionType):
        return {value}
    if isinstance(value, tuple):
        return set().union(*(_names(part) for part in value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {type(value)}.union(*(_names(getattr(value, field.name)) for field in dataclasses.fields(value)))
    return set()


def check_gradients(subject: Subject, setup: Setup = DEFAULT) -> None:
    """The gradient of the loss is finite and reaches every parameter that training moves."""
    model, text = model_of(subject, setup), Text.cut(setup)
    loss, gradients = loss_gradient(model, text, setup.key(0), setup.samples)
    require(jnp.isfinite(loss), "The loss is finite.", f"It is {float(loss)}.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        name = f"model{jax.tree_util.keystr(path)}"
        require(jnp.all(jnp.isfinite(leaf)), "Gradients of the loss are finite.", f"That of {name} is not.")
        contract = "The loss trains every parameter outside a Frozen."
        require(
            jnp.any(leaf),
            contract,
            f"{name} gets no gradient: freeze it, or let the objective or the chunker train it.",
        )


def check_extremes(subject: Subject, setup: Setup = DEFAULT) -> None:
    """Gradients are finite where hidden states are huge, zero, or all the same."""
    model, text = model_of(subject, setup), Text.cut(setup)
    usual = states(model, setup)
    extremes = {"10000 times as large": 1e4 * usual, "zero": 0 * usual, "all the same": jnp.ones_like(usual)}
    for name, hidden in extremes.items():
        gradients = router_gradient(model.stage.estimators[0], hidden, text, setup.key(0), setup.samples)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
            where = "hidden states" if path[0].idx else f"estimator{jax.tree_util.keystr(path[1:])}"
            contract = "Gradients of the objective and the chunker are finite for whatever hidden states."
            require(jnp.all(jnp.isfinite(leaf)), contract, f"With states that are {name}, that of {where} is not.")


Check = Callable[[Subject, Setup], None]

CHECKS: tuple[Check, ...] = (
    check_shapes,
    check_boundaries,
    check_causality,
    check_causality_of_gradients,
    check_batch,
    check_packing,
    check_decoding,
    check_chunking,
    check_capacity,
    check_constraints,
    check_saving,
    check_gradients,
    check_extremes,
)
"""All clauses, for instance for `pytest.mark.parametrize`."""


def check_estimator(
    subject: Subject,
    *,
    dim: int | None = None,
    chunker: AbstractChunker | None = None,
    rate: float = DEFAULT.rate,
    text: str = DEFAULT.text,
    samples: int = 1,
    constraints: tuple[AbstractConstraint, ...] = (),
    seed: int = 0,
) -> None:
    """Raises `ContractError`, with the clause and what was seen, unless the estimator keeps every one of `CHECKS`.

    `subject`: an estimator, its configuration, a class or a name that `--estimator` takes (with its default settings), a function
    of the width and a key that returns an estimator, or a whole model. See `Setup` for the rest; an estimator for states of
    width `dim` is checked in a small model of that width.
    Raises `TypeError` for what is no estimator.
    """
    setup = Setup(dim, chunker, rate, text, samples, constraints, seed)
    model = model_of(subject, setup)
    for check in CHECKS:
        check(model, setup)


def check_constraint(subject: AbstractConstraint | type[AbstractConstraint] | str, *, text: str = DEFAULT.text) -> None:
    """Raises `ContractError`, with the clause and what was seen, unless a constraint keeps its contract: the score-function
    estimator keeps every one of `CHECKS` under it. `subject`: a constraint, a class of one or a name that `--constrain` takes,
    made with its default settings."""
    if isinstance(subject, str):
        subject = find(CONSTRAINTS, subject).cls
    constraint = (
        construct(Part(CONSTRAINTS, subject.__name__, subject), {}, {"level": 0})
        if isinstance(subject, type)
        else subject
    )
    if not isinstance(constraint, AbstractConstraint):
        raise TypeError(f"what is checked must be a constraint; got a {type(constraint).__name__}")
    check_estimator("sfe", constraints=(constraint,), text=text)
