"""Writing texts: a batch of prompts, read at once and then continued byte by byte."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from estimators.base import BOS, EOS, VOCAB, Keys, uniforms_from, written
from unet import utf8
from unet.cache import with_room
from unet.model import TextState, UNet
from unet.reading import as_bytes, drawing_keys, keys_of, rate_of, read
from unet.sampling import Sampling, draw

CHUNK = 64
"""Bytes that are written between two looks at what was written."""


@dataclass(frozen=True)
class Piece:
    """Some more of one text.

    `log_lik`: of each byte in nats, under the model as it is, whatever the sampling made of it; `closed_levels`: how many
    levels closed a token with it, counted from the outermost (0, without one). `finish` says why the text ends here, if it
    does: the model wrote the byte EOS, or one of the `stop` strings (neither is part of the text), or there were as many bytes
    as asked for.
    """

    bytes: bytes
    log_lik: np.ndarray
    closed_levels: np.ndarray
    finish: Literal["eos", "stop", "length"] | None

    @property
    def boundaries(self) -> np.ndarray:
        """Whether the outermost level closed a token with a byte."""
        return self.closed_levels > 0


@dataclass(frozen=True)
class Pace:
    """What writing cost: `prefill_seconds` for the prompts; `steps` of the byte level, `token_steps` of them in which the token
    level ran as well, and `bytes` written in all texts; `seconds` and `timed_bytes` after the first chunk, with which what
    does not come from a cache is compiled."""

    prefill_seconds: float = 0.0
    seconds: float = 0.0
    timed_bytes: int = 0
    bytes: int = 0
    steps: int = 0
    token_steps: int = 0

    @property
    def bytes_per_second(self) -> float:
        """Bytes of all texts together; not a number where one chunk was all."""
        return self.timed_bytes / self.seconds if self.timed_bytes else math.nan

    def after(self, chunk: Chunk, seconds: float) -> Pace:
        """With one more chunk."""
        bytes, timed = int(chunk.there.sum()), self.steps > 0
        return Pace(
            self.prefill_seconds,
            self.seconds + seconds * timed,
            self.timed_bytes + bytes * timed,
            self.bytes + bytes,
            self.steps + int(chunk.steps),
            self.token_steps + int(chunk.token_steps),
        )


@dataclass(frozen=True)
class Written:
    """One text: its `prompt`, with how many levels closed a token with each of its bytes, and what was written after it as one
    piece."""

    prompt: bytes
    prompt_closed_levels: np.ndarray
    piece: Piece

    @property
    def prompt_boundaries(self) -> np.ndarray:
        """Whether the outermost level closed a token with a byte of the prompt."""
        return self.prompt_closed_levels > 0

    @property
    def text(self) -> str:
        """What was written, with U+FFFD for what is no UTF-8."""
        return self.piece.bytes.decode("utf-8", errors="replace")


@dataclass(frozen=True)
class Generated:
    """The texts in the order of their prompts."""

    texts: tuple[Written, ...]
    pace: Pace


class Hand(eqx.Module):
    """Where some texts stand: the model's `state`, the `logits` of the next byte, the `keys` that draw it, how many bytes each
    may still have (`left`), the state of UTF-8, and whether it is `done`."""

    state: TextState
    logits: Float[Array, "batch vocab"]
    keys: Key[Array, " batch"]
    left: Int[Array, " batch"]
    character: Int[Array, " batch"]
    done: Bool[Array, " batch"]


class Chunk(eqx.Module):
    """What was written in one go: bytes (EOS included), their log-likelihoods in nats, how many levels closed a token with each,
    which rows there are; and how often each level ran."""

    bytes: Int[Array, "batch length"]
    log_lik: Float[Array, "batch length"]
    closed: Int[Array, "batch length"]
    there: Bool[Array, "batch length"]
    steps: Int[Array, ""]
    token_steps: Int[Array, ""]


class Continued(eqx.Module):
    """A chunk, and where the texts stand after it."""

    chunk: Chunk
    hand: Hand


class Task(eqx.Module):
    """What does not change from chunk to chunk: see `Writer`."""

    model: UNet
    sampling: Sampling
    valid: bool
    endless: bool
    length: int


def drawable(hand: Hand, task: Task) -> Bool[Array, "batch vocab"]:
    """The bytes that may be drawn: all but BOS, and but EOS where texts are `endless`; where they are to be `valid` UTF-8, those
    that can stand there, and EOS after a whole character."""
    values = jnp.arange(VOCAB)
    if not task.valid:
        return jnp.broadcast_to((values != BOS) & ~((values == EOS) & task.endless), hand.logits.shape)
    allowed = utf8.can_follow(hand.character, hand.left)
    return allowed if task.endless else allowed | (values == EOS) & (hand.character == utf8.COMPLETE)[:, None]


def write_byte(
    task: Task, hand: Hand, choice: Float[Array, " batch"], noise: Float[Array, " batch"] | None
) -> Continued:
    """One more byte of every text that is not done, as a chunk of length 1, drawn by the uniform numbers `choice`; and its
    boundary, by `noise`."""
    there = ~hand.done
    byte = draw(jnp.where(drawable(hand, task), hand.logits, -jnp.inf), task.sampling, choice)
    log_lik = jnp.take_along_axis(jax.nn.log_softmax(hand.logits, axis=-1), byte[:, None], axis=1)
    goes_on = there & (byte != EOS)
    after = task.model.step(byte, hand.state, goes_on, noise=noise)
    # An inner level that did not run closed nothing, whatever stands in its row.
    closed = sum(
        (here.astype(jnp.int32) for here in itertools.accumulate(after.closed, jnp.logical_and)), jnp.zeros_like(byte)
    )
    left = hand.left - goes_on.astype(jnp.int32)
    hand = Hand(
        written(hand.state, after.change, goes_on),
        jnp.where(goes_on[:, None], after.logits, hand.logits),
        hand.keys,
        left,
        utf8.next_state(hand.character, byte),
        hand.done | (byte == EOS) | (left <= 0),
    )
    ran = jnp.any(closed > 0).astype(jnp.int32)
    one = Chunk(byte[:, None], log_lik, closed[:, None], there[:, None], jnp.ones((), jnp.int32), ran)
    return Continued(one, hand)


@eqx.filter_jit(donate="all-except-first")
def write_chunk(task: Task, hand: Hand) -> Continued:
    """Up to `length` more bytes of every text, fewer where all are done before."""
    batch, length = hand.done.shape[0], task.length
    blank = Chunk(
        jnp.zeros((batch, length), jnp.int32),
        jnp.zeros((batch, length)),
        jnp.zeros((batch, length), jnp.int32),
        jnp.zeros((batch, length), bool),
        jnp.zeros((), jnp.int32),
        jnp.zeros((), jnp.int32),
    )

    # All texts that are not done have come equally far since the chunk began.
    choices, noise = uniforms_from(hand.keys, hand.state.count, length), hand.state.noise(length)

    def goes_on(carry: Continued) -> Bool[Array, ""]:
        return (carry.chunk.steps < length) & ~jnp.all(carry.hand.done)

    def more(carry: Continued) -> Continued:
        done = carry.chunk
        here = jax.tree.map(lambda rows: jax.lax.dynamic_index_in_dim(rows, done.steps, 1, False), (choices, noise))
        one = write_byte(task, carry.hand, *here)

        def put(row: Array, rows: Array) -> Array:
            return rows + row if rows.ndim == 0 else jax.lax.dynamic_update_slice(rows, row, (0, done.steps))

        return Continued(jax.tree.map(put, one.chunk, done), one.hand)

    return jax.lax.while_loop(goes_on, more, Continued(blank, hand))


class Writer:
    """A batch of texts being written, its prompts already read.

    Every text is drawn with a key of its own, for its bytes and for its boundaries, so that it does not depend on the texts
    beside it.
    """

    prompts: tuple[bytes, ...]
    prompt_closed_levels: tuple[np.ndarray, ...]
    pace: Pace

    def __init__(
        self,
        model: UNet,
        prompts: Sequence[bytes],
        *,
        max_bytes: int,
        key: Keys,
        sampling: Sampling | None = None,
        stop: Sequence[bytes] = (),
        valid: bool = False,
        likelier: bool = False,
        endless: bool = False,
        chunk: int = CHUNK,
    ):
        """`max_bytes`: of each text beyond its prompt. `key`: one for all, or one for each. `stop`: strings before which a text
        ends. `valid`: draw only what keeps the text valid UTF-8, whole characters at the end included (that of the prompt is
        its own affair). `likelier`: do not draw boundaries, but take the likelier action of each byte. `endless`: never draw
        the byte EOS, which otherwise ends a text. `chunk`: bytes written between two looks.

        Raises `ValueError` for no prompts, too few bytes, an empty stop string, a prompt with the byte BOS or EOS, and another
        number of keys than of prompts.
        """
        if max_bytes < 1 or chunk < 1:
            raise ValueError(f"at least 1 byte is written; got {max_bytes} bytes in chunks of {chunk}")
        if not prompts:
            raise ValueError("there is no prompt to go on from; an empty one would do")
        if not all(stop):
            raise ValueError("a stop string has at least one byte")
        characters = np.array([utf8.state_after(prompt) for prompt in prompts], np.int32)
        if valid and max(utf8.LACKING[characters]) > max_bytes:
            raise ValueError(f"{max_bytes} more bytes cannot complete the last character of a prompt")
        started = time.perf_counter()
        keys = keys_of(key, len(prompts))
        ready = read(model, prompts, None if likelier else drawing_keys(keys))
        sizes, closed = [1 + len(prompt) for prompt in prompts], np.asarray(ready.closed)
        self.prompts = tuple(prompts)
        self.prompt_closed_levels = tuple(row[1:size].copy() for row, size in zip(closed, sizes, strict=True))
        self._task = Task(model, (Sampling() if sampling is None else sampling).checked(), valid, endless, chunk)
        self._texts = tuple(_Text(tuple(stop)) for _ in prompts)
        # A cache that is too small grows, but each size is a new program: tokens as frequent as in the prompts, of which short
        # ones say little, and some more.
        rate = float(np.max(((closed > 0).sum(axis=1) + 64 * rate_of(model)) / (np.array(sizes) + 64)))
        self._expected = math.ceil(1.2 * rate * max_bytes) + chunk
        self._hand = Hand(
            with_room(ready.state, self._expected),
            ready.logits,
            jax.vmap(jax.random.fold_in, (0, None))(keys, 1),
            jnp.full((len(prompts),), max_bytes, jnp.int32),
            jnp.asarray(characters),
            jnp.zeros((len(prompts),), bool),
        )
        jax.block_until_ready(self._hand.logits)
        self.pace = Pace(time.perf_counter() - started)

    @property
    def done(self) -> bool:
        """Whether all texts have ended."""
        return all(text.finished for text in self._texts)

    def go_on(self) -> tuple[Piece | None, ...]:
        """The next piece of each text, None for those that ended before. A piece never ends within what may become a stop
        string."""
        started, texts = time.perf_counter(), self._texts
        continued = write_chunk(self._task, eqx.tree_at(lambda hand: hand.state, self._hand, self._roomy()))
        chunk, hand = jax.tree.map(np.array, continued.chunk), continued.hand
        ended = np.array(hand.done)
        pieces = tuple(
            None if text.finished else text.piece(chunk, row, ended=bool(ended[row])) for row, text in enumerate(texts)
        )
        finished = np.array([text.finished for text in texts])
        self._hand = eqx.tree_at(lambda hand: hand.done, hand, jnp.asarray(finished))
        self.pace = self.pace.after(chunk, time.perf_counter() - started)
        return pieces

    @property
    def state(self) -> TextState:
        """What the model keeps of the texts so far. It is written over by `go_on`."""
        return self._hand.state

    def _roomy(self) -> TextState:
        roomy = with_room(self._hand.state, self._task.length)
        return self._hand.state if roomy is self._hand.state else with_room(self._hand.state, self._expected)


class _Text:
    """One text as it comes in chunks: holds back what may become a stop string, and notices the end."""

    def __init__(self, stop: tuple[bytes, ...]):
        self.finished = False
        self._stop = stop
        self._bytes, self._log_lik, self._closed = b"", np.zeros(0, np.float32), np.zeros(0, np.int32)

    def piece(self, chunk: Chunk, row: int, *, ended: bool) -> Piece:
        there = chunk.there[row] & (chunk.bytes[row] != EOS)
        finish = "eos" if np.any(chunk.there[row] & (chunk.bytes[row] == EOS)) else "length" if ended else None
        self._bytes += chunk.bytes[row][there].astype(np.uint8).tobytes()
        self._log_lik = np.concatenate([self._log_lik, chunk.log_lik[row][there]])
        self._closed = np.concatenate([self._closed, chunk.closed[row][there]])
        found = [place for stop in self._stop if (place := self._bytes.find(stop)) >= 0]
        if found:
            finish = "stop"
        self.finished = finish is not None
        size = min(found) if found else len(self._bytes) if self.finished else len(self._bytes) - self._held_back()
        piece = Piece(self._bytes[:size], self._log_lik[:size], self._closed[:size], finish)
        self._bytes, self._log_lik, self._closed = self._bytes[size:], self._log_lik[size:], self._closed[size:]
        return piece

    def _held_back(self) -> int:
        """The length of the longest end that a stop string begins with."""
        return max((n for stop in self._stop for n in range(1, len(stop)) if self._bytes.endswith(stop[:n])), default=0)


def generate(
    model: UNet,
    prompts: Sequence[str | bytes],
    *,
    max_bytes: int,
    key: Keys,
    sampling: Sampling | None = None,
    stop: Sequence[str | bytes] = (),
    valid: bool = False,
    likelier: bool = False,
    endless: bool = False,
    chunk: int = CHUNK,
) -> Generated:
    """Continue each prompt to its end: see `Writer`, which does it piece by piece."""
    writer = Writer(
        model,
        [as_bytes(prompt) for prompt in prompts],
        max_bytes=max_bytes,
        key=key,
        sampling=sampling,
        stop=[as_bytes(text) for text in stop],
        valid=valid,
        likelier=likelier,
        endless=endless,
        chunk=chunk,
    )
    pieces: list[list[Piece]] = [[] for _ in prompts]
    while not writer.done:
        for mine, piece in zip(pieces, writer.go_on(), strict=True):
            if piece is not None:
                mine.append(piece)
    whole = map(joined, pieces)
    return Generated(tuple(map(Written, writer.prompts, writer.prompt_closed_levels, whole)), writer.pace)


def joined(pieces: Sequence[Piece]) -> Piece:
    """Pieces that follow each other as one."""
    return Piece(
        b"".join(piece.bytes for piece in pieces),
        np.concatenate([piece.log_lik for piece in pieces]),
        np.concatenate([piece.closed_levels for piece in pieces]),
        pieces[-1].finish,
    )
