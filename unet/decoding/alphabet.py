"""What a model reads and predicts, one symbol after another: bytes, or tokens that are strings of bytes."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from estimators.base import BOS, EOS, VOCAB
from unet.decoding.utf8 import AFTER, COMPLETE, LACKING

BYTES = tuple(bytes([value]) for value in range(VOCAB))
"""The symbols of a model of bytes."""


class Alphabet(eqx.Module):
    """The symbols that a model can draw: how many bytes each has (`sizes`; 0: it is never drawn), and the UTF-8 state after it
    for each state before it, strictly (`after`: -1 where a byte is invalid) and leniently (`next_states`: an invalid byte
    counts as a complete character). `bos` and `eos` are the symbols that mark the ends of a document."""

    sizes: Int[Array, " vocab"]
    after: Int[Array, "states vocab"]
    next_states: Int[Array, "states vocab"]
    bos: int = eqx.field(static=True)
    eos: int = eqx.field(static=True)

    @classmethod
    def of(cls, symbols: Sequence[bytes], marks: tuple[int, int] | None = None) -> Alphabet:
        """The alphabet of these symbols, which must have every single byte. `marks`: the numbers of BOS and EOS, by default those
        of the symbols that are these bytes. Raises `ValueError` if BOS or EOS is missing."""
        sizes = np.array([len(symbol) for symbol in symbols], np.int32)
        strict, lenient = _states_after(symbols, sizes)
        bos, eos = marks or (symbols.index(bytes([BOS])), symbols.index(bytes([EOS])))
        return cls(jnp.asarray(sizes), jnp.asarray(strict), jnp.asarray(lenient), bos, eos)

    def allowed(
        self, character: Int[Array, " batch"], left: Int[Array, " batch"], *, valid: bool, endless: bool
    ) -> Bool[Array, "batch vocab"]:
        """The symbols that may come next where `left` bytes may still come: BOS never, EOS not if texts are `endless`. For
        `valid` UTF-8 only those that can follow the UTF-8 state `character` and leave room for its end, and EOS after a
        complete character."""
        values = jnp.arange(self.sizes.shape[0])
        fits = (self.sizes > 0) & (values != self.bos) & (values != self.eos)
        if valid:
            after = self.after[character]
            missing = jnp.asarray(LACKING)[jnp.maximum(after, 0)]
            fits = fits & (after >= 0) & (self.sizes + missing <= left[:, None])
            ends = (values == self.eos) & (character == COMPLETE)[:, None]
        else:
            fits = fits & (self.sizes <= left[:, None])
            ends = jnp.broadcast_to(values == self.eos, fits.shape)
        return fits if endless else fits | ends

    def next_state(self, character: Int[Array, " batch"], symbol: Int[Array, " batch"]) -> Int[Array, " batch"]:
        """The UTF-8 state after one more symbol."""
        return self.next_states[character, symbol]


def _states_after(symbols: Sequence[bytes], sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The UTF-8 state after each symbol for each state before it, strict and lenient."""
    joined = np.frombuffer(b"".join(symbols), np.uint8)
    starts = np.cumsum(sizes) - sizes
    strict = np.repeat(np.arange(len(LACKING), dtype=np.int32)[:, None], len(symbols), axis=1)
    lenient = strict.copy()
    for place in range(int(sizes.max(initial=0))):
        long = np.flatnonzero(sizes > place)
        byte = joined[starts[long] + place]
        before = strict[:, long]
        strict[:, long] = np.where(before < 0, -1, AFTER[np.maximum(before, 0), byte])
        lenient[:, long] = np.maximum(AFTER[lenient[:, long], byte], COMPLETE)
    return strict, lenient


@functools.cache
def byte_alphabet(marks: int = 0) -> Alphabet:
    """The alphabet of models of bytes and of so many other marks, which are never drawn."""
    return Alphabet.of((*BYTES, *(b"",) * marks))


def at_last_bytes(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Values of symbols as values of their bytes: each at the last byte of its symbol, 0 at the others."""
    spread = np.zeros(int(sizes.sum()), values.dtype)
    spread[np.cumsum(sizes) - 1] = values
    return spread
