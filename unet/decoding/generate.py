"""Generation: prefill a batch of prompts, then decode byte by byte."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from estimators.base import Keys, uniforms_from
from estimators.bounds import require_within
from estimators.decode_state import update_state
from unet.decoding import utf8
from unet.decoding.alphabet import Alphabet, at_last_bytes
from unet.decoding.kv_cache import most_slots, with_room
from unet.decoding.pieces import Generation, Piece, joined
from unet.decoding.sampling import ChunkBytes, NumBytes, Sampling, draw
from unet.decoding.score import depth_of_bytes, drawing_keys, keys_of, prefill, rate_of, texts_as_bytes
from unet.hierarchy import boundary_depth
from unet.language_model import AbstractLanguageModel
from unet.local_devices import LocalDevices, by_row
from unet.model import TextState, UNet
from unet.numerics import with_rank_promotion

CHUNK = 64
"""Bytes decoded per compiled call."""

RESERVED = 2**13
"""Slots of a cache, at most, that are reserved before there is anything to fill them; longer ones double as they fill."""


@dataclass(frozen=True)
class Throughput:
    """Cost of generation: `prefill_seconds` for the prompts; `steps` of one byte (or token) each, at `token_steps` of which any
    text closed a token, so that the token level ran as well; `bytes` of all texts. `seconds` and `timed_bytes` leave out the
    first chunk, whose time may include compilation."""

    prefill_seconds: float = 0.0
    seconds: float = 0.0
    timed_bytes: int = 0
    bytes: int = 0
    steps: int = 0
    token_steps: int = 0

    @property
    def bytes_per_second(self) -> float:
        """Bytes of all texts per second; NaN if there was only one chunk."""
        return self.timed_bytes / self.seconds if self.timed_bytes else math.nan

    def after(self, chunk: Chunk, bytes: int, seconds: float) -> Throughput:
        """The same including one more chunk, of so many bytes."""
        timed = self.steps > 0
        # A step is one at which any text got a symbol.
        steps, token_steps = (int(np.any(part, axis=0).sum()) for part in (chunk.valid, np.asarray(chunk.depth) > 0))
        return Throughput(
            self.prefill_seconds,
            self.seconds + seconds * timed,
            self.timed_bytes + bytes * timed,
            self.bytes + bytes,
            self.steps + steps,
            self.token_steps + token_steps,
        )


@dataclass(frozen=True)
class Generated:
    """The texts in the order of their prompts."""

    texts: tuple[Generation, ...]
    throughput: Throughput


class DecodeState(eqx.Module):
    """State of the decoding loop: the model's `state`, the `logits` of the next symbol (a byte or a token), the `keys` that draw
    symbols, how many bytes each text may still get (`left`), the UTF-8 state (`character`), and whether a text is `done`."""

    state: TextState
    logits: Float[Array, "batch vocab"]
    keys: Key[Array, " batch"]
    left: Int[Array, " batch"]
    character: Int[Array, " batch"]
    done: Bool[Array, " batch"]


class Chunk(eqx.Module):
    """Symbols decoded in one call (EOS included), their log-probabilities in nats, the boundary depth at each, and which of them
    are `valid`."""

    symbols: Int[Array, "batch length"]
    logprobs: Float[Array, "batch length"]
    depth: Int[Array, "batch length"]
    valid: Bool[Array, "batch length"]


class DecodedChunk(eqx.Module):
    """A chunk and the state after it."""

    chunk: Chunk
    state: DecodeState


class DecodeSettings(eqx.Module):
    """What stays the same from chunk to chunk: see `TextStream`."""

    model: UNet
    alphabet: Alphabet
    sampling: Sampling
    valid: bool
    endless: bool
    length: int


def allowed_symbols(state: DecodeState, settings: DecodeSettings) -> Bool[Array, "batch vocab"]:
    """The symbols that may be drawn (`Alphabet.allowed`)."""
    return settings.alphabet.allowed(state.character, state.left, valid=settings.valid, endless=settings.endless)


def decode_symbol(
    settings: DecodeSettings, state: DecodeState, choice: Float[Array, " batch"], noise: Float[Array, " batch"] | None
) -> DecodedChunk:
    """Decode one symbol of every text that is not done, as a chunk of length 1. The uniform numbers `choice` draw the symbols,
    `noise` their boundaries."""
    valid, alphabet = ~state.done, settings.alphabet
    symbol = draw(jnp.where(allowed_symbols(state, settings), state.logits, -jnp.inf), settings.sampling, choice)
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(state.logits, axis=-1), symbol[:, None], axis=1)
    active = valid & (symbol != alphabet.eos)
    decoded = settings.model.decode(
        symbol[:, None], state.state, mask=active[:, None], noise=None if noise is None else noise[:, None]
    )
    depth = boundary_depth(decoded.prediction.levels, active[:, None])
    left = state.left - jnp.where(active, alphabet.sizes[symbol], 0)
    next_state = DecodeState(
        update_state(state.state, decoded.update, active.astype(jnp.int32)),
        jnp.where(active[:, None], decoded.logits[:, 0], state.logits),
        state.keys,
        left,
        alphabet.next_state(state.character, symbol),
        state.done | (symbol == alphabet.eos) | (left <= 0),
    )
    return DecodedChunk(Chunk(symbol[:, None], logprobs, depth, valid[:, None]), next_state)


@functools.partial(by_row, donate="all-except-first")
@with_rank_promotion
def decode_chunk(settings: DecodeSettings, state: DecodeState) -> DecodedChunk:
    """Decode up to `length` symbols of every text, fewer if all are done earlier."""
    batch, length = state.done.shape[0], settings.length
    empty = Chunk(
        jnp.zeros((batch, length), jnp.int32),
        jnp.zeros((batch, length), jnp.float32),
        jnp.zeros((batch, length), jnp.int32),
        jnp.zeros((batch, length), bool),
    )

    # Random numbers for all steps at once. All texts that are not done are at the same step, so one index serves them.
    choices, noise = uniforms_from(state.keys, state.state.count, length), state.state.noise(length)

    def unfinished(carry: tuple[Int[Array, ""], DecodedChunk]) -> Bool[Array, ""]:
        steps, decoded = carry
        return (steps < length) & ~jnp.all(decoded.state.done)

    def step(carry: tuple[Int[Array, ""], DecodedChunk]) -> tuple[Int[Array, ""], DecodedChunk]:
        place, before = carry
        choice, own_noise = jax.tree.map(
            lambda uniforms: jax.lax.dynamic_index_in_dim(uniforms, place, 1, False), (choices, noise)
        )
        decoded = decode_symbol(settings, before.state, choice, own_noise)

        def write(new: Array, so_far: Array) -> Array:
            return jax.lax.dynamic_update_slice(so_far, new, (jnp.zeros_like(place), place))

        return place + 1, DecodedChunk(jax.tree.map(write, decoded.chunk, before.chunk), decoded.state)

    _, decoded = jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), DecodedChunk(empty, state)))
    return decoded


class TextStream:
    """Texts generated piece by piece: an iterator over one decode state.

    Each iteration yields the next piece of each text, None for texts that have ended, until all have. Every text has its own
    key for its bytes and boundaries, so it does not depend on the other texts of the batch.
    """

    prompts: tuple[bytes, ...]
    prompt_boundary_depth: tuple[np.ndarray, ...]
    throughput: Throughput

    def __init__(
        self,
        model: AbstractLanguageModel,
        prompts: Sequence[str | bytes] | str | bytes,
        *,
        max_bytes: int,
        key: Keys,
        sampling: Sampling | None = None,
        stop: Sequence[str | bytes] | str | bytes = (),
        valid: bool = False,
        greedy_boundaries: bool = False,
        endless: bool = False,
        chunk: int = CHUNK,
    ):  # Ten parameters, since few are used at once: an object would hold the same names.
        """Prefill the prompts, or a single one.

        `max_bytes`: limit for each text, not counting its prompt. `key`: one for all texts, or one each. `stop`: strings, or a
        single one, that end a text and are not part of it. `valid`: draw only bytes that keep the text valid UTF-8 and let it
        end with a complete character (the prompt itself is not checked). `greedy_boundaries`: greedy instead of sampled
        boundaries. `endless`: never draw the byte EOS, which otherwise ends a text. `chunk`: bytes, or tokens of a model of
        tokens, decoded per piece.

        Raises `ValueError` for no prompts, limits out of range, an empty stop string, a prompt with the byte BOS or EOS or whose
        last character cannot be completed (`valid`), texts that may need more tokens than the model has learned positions, and
        keys neither one nor one per prompt; `TypeError` for what is no text.
        """
        require_within("max_bytes", max_bytes, NumBytes)
        require_within("chunk", chunk, ChunkBytes)
        prompts, stop = texts_as_bytes(prompts), texts_as_bytes(stop)
        sampling = (Sampling() if sampling is None else sampling).checked(len(model.symbols))
        characters = _characters(prompts, stop, max_bytes if valid else None)
        started = time.perf_counter()
        keys, self._devices = keys_of(key, len(prompts)), LocalDevices.of(len(prompts), model)
        model = self._devices.everywhere(model)
        ready = prefill(model, prompts, None if greedy_boundaries else drawing_keys(keys))
        sizes, depth = np.array([1 + len(encoded) for encoded in ready.symbols]), np.asarray(ready.prefilled.depth)
        # A token has a byte at least.
        model.unet.require_positions(int(np.max(sizes)) + max_bytes)
        self.prompts = tuple(prompts)
        self.prompt_boundary_depth = tuple(
            depth_of_bytes(model, encoded, row[1:]) for row, encoded in zip(depth, ready.symbols, strict=True)
        )
        self._settings = DecodeSettings(model.unet, model.alphabet, sampling, valid, endless, chunk)
        self._model = model
        self._texts = tuple(_Text(tuple(stop)) for _ in prompts)
        # A full cache grows, but each new size compiles a new program. So reserve slots for the token rate of the prompts,
        # smoothed by the expected rate because short prompts say little, plus a margin.
        tokens = (depth > 0).sum(axis=1) if model.estimators else sizes
        rate = float(np.max((tokens + 64 * rate_of(model.unet)) / (sizes + 64)))
        self._expected = math.ceil(1.2 * rate * max_bytes) + chunk
        self._state = DecodeState(
            self._with_reserve(ready.prefilled.state),
            ready.prefilled.logits,
            jax.vmap(jax.random.fold_in, (0, None))(keys, 1),
            jnp.full((len(prompts),), max_bytes, jnp.int32),
            jnp.asarray(characters),
            jnp.zeros((len(prompts),), bool),
        )
        jax.block_until_ready(self._state.logits)
        self.throughput = Throughput(time.perf_counter() - started)

    def __iter__(self) -> Iterator[tuple[Piece | None, ...]]:
        """The next pieces. Bytes that may begin a stop string are held back until it is complete or ruled out."""
        while not all(text.finished for text in self._texts):
            started, texts = time.perf_counter(), self._texts
            ready = eqx.tree_at(lambda one: one.state, self._state, self._state_with_room())
            decoded = decode_chunk(self._settings, self._devices.rows(ready))
            chunk, state = jax.tree.map(np.array, decoded.chunk), decoded.state
            ended, new = np.array(state.done), self._new(chunk)
            pieces = tuple(
                None if text.finished else text.piece(new[row], ended=bool(ended[row]))
                for row, text in enumerate(texts)
            )
            finished = np.array([text.finished for text in texts])
            self._state = eqx.tree_at(lambda one: one.done, state, jnp.asarray(finished))
            size = int(np.asarray(self._settings.alphabet.sizes)[chunk.symbols][chunk.valid].sum())
            self.throughput = self.throughput.after(chunk, size, time.perf_counter() - started)
            yield pieces

    def _new(self, chunk: Chunk) -> list[Piece]:
        """The bytes of each row of a chunk. Only EOS ends a text here."""
        symbols, eos, rows = self._model.symbols, self._settings.alphabet.eos, []
        drawn_symbols, logprobs, depth = (np.asarray(part) for part in (chunk.symbols, chunk.logprobs, chunk.depth))
        for row, valid in enumerate(np.asarray(chunk.valid)):
            drawn = valid & (drawn_symbols[row] != eos)
            own = drawn_symbols[row][drawn]
            sizes = np.array([len(symbols[one]) for one in own], np.int64)
            rows.append(
                Piece(
                    b"".join([symbols[one] for one in own]),
                    at_last_bytes(logprobs[row][drawn], sizes),
                    depth_of_bytes(self._model, own, depth[row][drawn]),
                    "eos" if np.any(valid & ~drawn) else None,
                )
            )
        return rows

    @property
    def state(self) -> TextState:
        """The model's decode state after the texts so far. Continuing to iterate overwrites its buffers."""
        return self._state.state

    def _state_with_room(self) -> TextState:
        """The state with slots for another chunk; if caches must grow for it, they get the expected number of slots again."""
        state = self._state.state
        grown = with_room(state, self._settings.length)
        return grown if grown is state else self._with_reserve(state)

    def _with_reserve(self, state: TextState) -> TextState:
        """The state with the expected number of slots more, or with twice as many as it has where that is less."""
        return with_room(state, max(self._settings.length, min(self._expected, max(RESERVED, most_slots(state)))))


def _characters(prompts: Sequence[bytes], stop: Sequence[bytes], max_bytes: int | None) -> Int[np.ndarray, " batch"]:
    """The UTF-8 state after each prompt. Raises `ValueError` for no prompts, an empty stop string, and a last character that
    `max_bytes` more bytes cannot complete (None: it need not be completed)."""
    if not prompts:
        raise ValueError("there is no prompt; to generate from nothing, pass one empty prompt")
    if not all(stop):
        raise ValueError("a stop string must have at least one byte")
    characters = np.array([utf8.state_after(prompt) for prompt in prompts], np.int32)
    if max_bytes is not None and max(utf8.LACKING[characters]) > max_bytes:
        raise ValueError(f"{max_bytes} more bytes cannot complete the last character of a prompt")
    return characters


class _Text:
    """Collects the chunks of one text: holds back bytes that may begin a stop string, and detects the end."""

    def __init__(self, stop: tuple[bytes, ...]):
        self.finished = False
        self._stop = stop
        self._bytes, self._logprobs, self._depth = b"", np.zeros(0, np.float32), np.zeros(0, np.int32)

    def piece(self, new: Piece, *, ended: bool) -> Piece:
        """The next piece, from what is new of a text; `ended`: whether it can get no more bytes."""
        finish = new.finish or ("length" if ended else None)
        self._bytes += new.bytes
        self._logprobs = np.concatenate([self._logprobs, new.logprobs])
        self._depth = np.concatenate([self._depth, new.boundary_depth])
        stops = [place for stop in self._stop if (place := self._bytes.find(stop)) >= 0]
        if stops:
            finish = "stop"
        self.finished = finish is not None
        size = min(stops) if stops else len(self._bytes) if self.finished else len(self._bytes) - self._held_back()
        piece = Piece(self._bytes[:size], self._logprobs[:size], self._depth[:size], finish)
        self._bytes, self._logprobs, self._depth = self._bytes[size:], self._logprobs[size:], self._depth[size:]
        return piece

    def _held_back(self) -> int:
        """Length of the longest suffix that is a proper prefix of a stop string."""
        return max((n for stop in self._stop for n in range(1, len(stop)) if self._bytes.endswith(stop[:n])), default=0)


def generate(
    model: AbstractLanguageModel,
    prompts: Sequence[str | bytes] | str | bytes,
    *,
    max_bytes: int,
    key: Keys,
    sampling: Sampling | None = None,
    stop: Sequence[str | bytes] | str | bytes = (),
    valid: bool = False,
    greedy_boundaries: bool = False,
    endless: bool = False,
    chunk: int = CHUNK,
) -> Generated:  # Ten parameters, as `TextStream` has.
    """Generate the whole continuation of each prompt (or of a single one); arguments as in `TextStream`."""
    stream = TextStream(
        model,
        prompts,
        max_bytes=max_bytes,
        key=key,
        sampling=sampling,
        stop=stop,
        valid=valid,
        greedy_boundaries=greedy_boundaries,
        endless=endless,
        chunk=chunk,
    )
    pieces: list[list[Piece]] = [[] for _ in stream.prompts]
    for new_pieces in stream:
        for so_far, piece in zip(pieces, new_pieces, strict=True):
            so_far += [] if piece is None else [piece]
    whole = map(joined, pieces)
    return Generated(tuple(map(Generation, stream.prompts, stream.prompt_boundary_depth, whole)), stream.throughput)
