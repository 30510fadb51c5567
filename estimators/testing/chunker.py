"""The clauses that every chunker keeps."""

from __future__ import annotations

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from estimators.base import AbstractChunker, Boundaries, ChunkerState, Downsampled, Tokens
from estimators.decode_state import update_state
from estimators.equations import start_of
from estimators.lookup import Part, construct
from estimators.testing.subject import alike, carries, first, program, require
from unet.chunkers import AbstractDownsampler, AbstractUpsampler, Chunker, Distribute, Select
from unet.chunkers.named import CHUNKERS, POOLS
from unet.decoding.kv_cache import with_room

BATCH, LENGTH, SECOND, PADDED = 3, 12, 7, 9
"""Rows and positions; where the second document of row 1 begins; where the padding of row 2 begins."""


@program
def down(
    chunker: AbstractChunker, hidden: Float[Array, "batch length dim"], boundaries: Boundaries, capacity: int
) -> Tokens:
    mask = _layout()[1]
    return chunker.down(hidden, boundaries, capacity=capacity, mask=mask).tokens


def use(
    chunker: AbstractChunker,
    hidden: Float[Array, "batch length dim"],
    boundaries: Boundaries,
    mask: Bool[Array, "batch length"],
    state: ChunkerState | None = None,
) -> tuple[Float[Array, "batch length dim"], ChunkerState]:
    """Down, a function of each token, and up."""
    kept = ChunkerState(None, None) if state is None else state
    found = chunker.down(hidden, boundaries, capacity=hidden.shape[1], mask=mask, state=kept.down)
    outputs = jnp.tanh(found.tokens.values) + found.tokens.values
    spread = chunker.up(outputs, found.tokens, hidden, boundaries, state=kept.up)
    return spread.hidden, ChunkerState(found.update, spread.update)


@program
def whole(
    chunker: AbstractChunker,
    hidden: Float[Array, "batch length dim"],
    boundaries: Boundaries,
    mask: Bool[Array, "batch length"],
) -> Float[Array, "batch length dim"]:
    return use(chunker, hidden, boundaries, mask)[0]


@program
def step(
    chunker: AbstractChunker,
    hidden: Float[Array, "batch length dim"],
    boundaries: Boundaries,
    place: Int[Array, "batch width"],
    there: Bool[Array, "batch width"],
    state: ChunkerState,
) -> tuple[Float[Array, "batch width dim"], ChunkerState]:
    """The positions at some `place`, of which those that are `there` come first, after those of the state."""
    rows = jnp.arange(BATCH)[:, None]
    states, part = jax.tree.map(lambda one: one[rows, place], (hidden, boundaries))
    actions, decided, starts = (one & there for one in (part.actions, part.decided, part.starts))
    relaxed = jnp.where(there, part.relaxed, 0.0)
    part = Boundaries(actions, part.logits, part.probs, decided, starts, relaxed)
    done, update = use(chunker, states, part, there, state)
    return done, update_state(state, update, jnp.sum(there, axis=1, dtype=jnp.int32))


@program
def pulls(
    chunker: AbstractChunker, hidden: Float[Array, "batch length dim"], boundaries: Boundaries
) -> Float[Array, "places batch length"]:
    """The absolute gradient of each place of the result with respect to each place of states, probabilities and boundaries."""

    def result(hidden: Float[Array, "batch length dim"], *drawn: Float[Array, "batch length"] | None):
        given = eqx.tree_at(lambda one: (one.probs, one.relaxed), boundaries, drawn)
        return jnp.sum(use(chunker, hidden, given, _layout()[1])[0], axis=-1).ravel()

    found = jax.jacrev(result, argnums=(0, 1, 2))(hidden, boundaries.probs, boundaries.relaxed)
    return jnp.sum(jnp.abs(found[0]), axis=-1) + jnp.abs(found[1]) + jnp.abs(found[2])


def _layout() -> tuple[Bool[Array, "batch length"], Bool[Array, "batch length"]]:
    """Starts and mask: one document, two documents, one document and padding."""
    starts, mask = np.zeros((BATCH, LENGTH), bool), np.ones((BATCH, LENGTH), bool)
    starts[:, 0], starts[1, SECOND], mask[2, PADDED:] = True, True, False
    return jnp.asarray(starts), jnp.asarray(mask)


def _drawn(seed: int, starts: Bool[Array, "batch length"], mask: Bool[Array, "batch length"]) -> Boundaries:
    keys = jax.random.split(jax.random.key(seed), 2)
    logits = jax.random.normal(keys[0], mask.shape, jnp.float32)
    actions = ((jax.random.uniform(keys[1], mask.shape, jnp.float32) < 0.4) | starts) & mask
    relaxed = actions.astype(jnp.float32)
    return Boundaries(actions, logits, jax.nn.sigmoid(logits), mask & ~starts, starts, relaxed)


def check_chunker(
    subject: AbstractChunker | AbstractDownsampler | AbstractUpsampler | type, *, dim: int = 32, seed: int = 0
) -> None:
    """Raises `ContractError`, with the clause and what was seen, unless a chunker keeps its contract for states of width `dim`.

    `subject`: a chunker, a downsampler (checked with `Distribute`), an upsampler (checked with `Select`), or a class of one,
    which is made with its default settings. Raises `TypeError` for anything else.

    Shapes and dtypes; every boundary becomes a token or is counted as overflow, and tokens beyond the capacity change no other;
    a position depends on positions up to it, in its own document and row, in values and in gradients; the decode state
    continues where it stopped.
    """
    chunker = _chunker_of(subject, dim, seed)
    states = jax.random.normal(jax.random.key(seed + 1), (BATCH, LENGTH, dim), jnp.float32)
    starts, mask = _layout()
    boundaries = _drawn(seed, starts, mask)
    _check_shapes(chunker, states, boundaries)
    _check_counts(chunker, states, boundaries)
    _check_reach(chunker, states, boundaries)
    _check_pieces(chunker, states, seed)


def _chunker_of(
    subject: AbstractChunker | AbstractDownsampler | AbstractUpsampler | type, dim: int, seed: int
) -> AbstractChunker:
    """Raises `TypeError` for anything else."""
    if isinstance(subject, type):
        given = {"dim": dim, "key": jax.random.key(seed), "pool": Select(), "implementation": None}
        kind = POOLS if issubclass(subject, AbstractDownsampler) else CHUNKERS
        made = construct(Part(kind, subject.__name__, subject), {}, given)
    else:
        made = subject
    if isinstance(made, AbstractUpsampler):
        return Chunker(Select(), made)
    if isinstance(made, AbstractDownsampler):
        return Chunker(made, Distribute())
    if not isinstance(made, AbstractChunker):
        raise TypeError(
            f"what is checked must be a chunker, a downsampler or an upsampler; got a {type(made).__name__}"
        )
    return made


def _check_shapes(chunker: AbstractChunker, hidden: Float[Array, "batch length dim"], boundaries: Boundaries) -> None:
    dim, mask = hidden.shape[-1], _layout()[1]
    for dtype in (jnp.float32, jnp.bfloat16):
        states = hidden.astype(dtype)
        made = eqx.filter_eval_shape(chunker.down, states, boundaries, capacity=5, mask=mask)
        contract = "A chunker's tokens have the dtype of the positions, rows x capacity x token_dim; places and counts are int32."
        require(isinstance(made, Downsampled), "`down` returns a Downsampled.", f"It returned a {type(made).__name__}.")
        tokens = made.tokens
        shapes = {
            "values": (dtype, (BATCH, 5, chunker.token_dim(dim))),
            "positions": (jnp.int32, (BATCH, 5)),
            "lengths": (jnp.int32, (BATCH,)),
            "overflow": (jnp.int32, (BATCH,)),
        }
        for name, expected in shapes.items():
            value = getattr(tokens, name)
            require((value.dtype, value.shape) == expected, contract, f"The {name} are {value.dtype} {value.shape}.")
        back, _ = eqx.filter_eval_shape(use, chunker, states, boundaries, mask)
        contract = "What comes up has the shape and the dtype of the positions."
        seen = f"From {jnp.dtype(dtype)} {states.shape} it is {back.dtype} {back.shape}."
        require((back.dtype, back.shape) == (dtype, states.shape), contract, seen)


def _check_counts(chunker: AbstractChunker, hidden: Float[Array, "batch length dim"], boundaries: Boundaries) -> None:
    count = np.asarray(jnp.sum(boundaries.actions, axis=1))
    full = down(chunker, hidden, boundaries, LENGTH)
    for capacity in (LENGTH, 3):
        tokens = full if capacity == LENGTH else down(chunker, hidden, boundaries, capacity)
        lengths, overflow, kept = (np.asarray(one) for one in (tokens.lengths, tokens.overflow, tokens.mask))
        contract = "Every boundary becomes a token, up to the capacity; those beyond it are counted as overflow."
        seen = f"Of {count} boundaries with room for {capacity}, there are {lengths} tokens and {overflow} overflowed."
        require(np.array_equal(lengths, np.minimum(count, capacity)), contract, seen)
        require(np.array_equal(lengths + overflow, count), contract, seen)
        for row in range(BATCH):
            places = np.flatnonzero(np.asarray(boundaries.actions)[row])[:capacity]
            expected = np.pad(places, (0, capacity - len(places)))
            contract = "The position of a token is that of its boundary, and 0 where there is none."
            got = np.asarray(tokens.positions)[row]
            require(np.array_equal(got, expected), contract, f"In row {row}: {got} instead of {expected}.")
        unused = np.any(np.asarray(tokens.values) != 0, axis=-1) & ~kept
        require(not unused.any(), "Tokens that are not there are zero.", f"One is not {first(unused)}.")
        contract = "A smaller capacity changes no token that it keeps."
        alike(contract, "One changed", full.values[:, :capacity], tokens.values, kept)


def _check_reach(chunker: AbstractChunker, hidden: Float[Array, "batch length dim"], boundaries: Boundaries) -> None:
    starts, mask = _layout()
    contract = "A position may depend on positions up to it only, of its own document and row."
    before = whole(chunker, hidden, boundaries, mask)
    require(jnp.all(jnp.isfinite(before)), "What comes up is finite.")
    other, own = _drawn(17, starts, mask), np.asarray(hidden)
    for place in range(1, LENGTH):
        kept = np.arange(LENGTH) < place
        states = jnp.asarray(np.where(kept[:, None], own, np.flip(own, 0) + 0.5))
        drawn = jax.tree.map(lambda old, new, kept=kept: jnp.asarray(np.where(kept, old, new)), boundaries, other)
        after = whole(chunker, states, drawn, mask)
        alike(contract, f"Other states from {place} on moved it", before, after, mask & kept)
    gradient = np.asarray(pulls(chunker, hidden, boundaries)).reshape(BATCH, LENGTH, BATCH, LENGTH)
    begin = np.asarray(start_of(starts))
    for row, place in itertools.product(range(BATCH), range(LENGTH)):
        if not mask[row, place]:
            continue
        reached = carries(gradient[row, place])
        reached[row, begin[row, place] : place + 1] = False
        seen = f"The gradient of position {place} in row {row} reached one {first(reached)}."
        require(not reached.any(), contract, seen)


def _check_pieces(chunker: AbstractChunker, hidden: Float[Array, "batch length dim"], seed: int) -> None:
    mask = jnp.ones((BATCH, LENGTH), bool)
    boundaries = _drawn(seed + 2, jnp.zeros_like(mask).at[:, 0].set(True), mask)
    expected = np.asarray(whole(chunker, hidden, boundaries, mask))
    got, dice = np.zeros_like(expected), np.random.default_rng(seed)
    done, every, state = np.zeros(BATCH, int), np.arange(BATCH)[:, None], chunker.init_state(BATCH, hidden.shape[-1])
    for width in itertools.chain((LENGTH, 4), itertools.repeat(1)):
        if (done == LENGTH).all():
            break
        some = np.asarray((1, 6, LENGTH - 1)) if width == LENGTH else dice.integers(0, width + 1, BATCH)
        some = np.minimum(some, LENGTH - done)
        place, there = np.minimum(done[:, None] + np.arange(width), LENGTH - 1), np.arange(width) < some[:, None]
        back, state = step(chunker, hidden, boundaries, jnp.asarray(place), jnp.asarray(there), state)
        state = with_room(state, LENGTH) if width == LENGTH else state
        got[np.broadcast_to(every, place.shape)[there], place[there]] = np.asarray(back)[there]
        done = done + some
    contract = "Pieces of a text, with the decode state, come up as the whole text does."
    alike(contract, "They differ", expected, got, atol=1e-4)
