"""Reading texts: what a model makes of a batch of them, and how likely it finds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from estimators.base import BOS, EOS, Keys, has_many
from unet.cache import rounded_up
from unet.likelihood import next_byte_log_lik
from unet.model import TextState, UNet
from unet.stage import closed_levels


@runtime_checkable
class HasOverflow(Protocol):
    """Something computed in a bounded number of token rows, and the boundaries for which there was none."""

    @property
    def overflow(self) -> Int[Array, " batch"] | None: ...


Result = TypeVar("Result", bound=HasOverflow)


def in_enough_rows(length: int, rate: float, compute: Callable[[int], Result]) -> Result:
    """`compute` with room for the tokens of texts of `length` bytes, of which about `rate` are expected to close one: where a
    first guess leaves some without room, all is computed once more with twice as many."""
    capacity = min(length, rounded_up(math.ceil(1.3 * rate * length)))
    while True:
        result = compute(capacity)
        if capacity == length or result.overflow is None or not np.any(result.overflow):
            return result
        capacity = min(length, 2 * capacity)


class Read(eqx.Module):
    """Texts that were read: the `logits` of the byte after each, how many levels `closed` a token with each of its rows, how
    many tokens had no room (`overflow`, None without a token level), and the `state` to go on from."""

    logits: Float[Array, "batch vocab"]
    closed: Int[Array, "batch length"]
    overflow: Int[Array, " batch"] | None
    state: TextState


@eqx.filter_jit
def _read(
    model: UNet,
    bytes: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    keys: Key[Array, " batch"] | None,
    capacity: int,
) -> Read:
    ready = model.prefill(bytes, mask=mask, keys=keys, capacities=(capacity,))
    levels, last = ready.prediction.levels, jnp.sum(mask, axis=1, dtype=jnp.int32) - 1
    logits = jnp.take_along_axis(ready.logits, last[:, None, None], axis=1, mode="clip")[:, 0]
    return Read(logits, closed_levels(levels, mask), levels[0].overflow if levels else None, ready.state)


def read(model: UNet, texts: Sequence[bytes], keys: Key[Array, " batch"] | None) -> Read:
    """Read texts, each behind a BOS, with boundaries drawn with `keys` (None: the likelier ones), none of them dropped.

    Raises `ValueError` where a text holds the byte BOS or EOS.
    """
    bytes, mask = jnp.asarray(padded(texts)), jnp.asarray(_mask(texts))
    return in_enough_rows(bytes.shape[1], rate_of(model), lambda capacity: _read(model, bytes, mask, keys, capacity))


def _mask(texts: Sequence[bytes]) -> Bool[np.ndarray, "batch length"]:
    lengths = np.array([1 + len(text) for text in texts])
    return np.arange(rounded_up(int(lengths.max()))) < lengths[:, None]


def padded(texts: Sequence[bytes]) -> Int[np.ndarray, "batch length"]:
    """Texts of bytes, each behind a BOS, filled up with zeros to one of a few lengths.

    Raises `ValueError` where one holds the byte BOS or EOS.
    """
    for number, text in enumerate(texts):
        if BOS in text or EOS in text:
            raise ValueError(
                f"text {number} holds the byte {BOS} or {EOS}, which no UTF-8 does: they mark the ends of texts"
            )
    bytes = np.zeros((len(texts), rounded_up(1 + max(map(len, texts)))), np.int32)
    for row, text in zip(bytes, texts, strict=True):
        row[: 1 + len(text)] = np.frombuffer(b"%c%b" % (BOS, text), np.uint8)
    return bytes


def rate_of(model: UNet) -> float:
    """The share of bytes at which the outermost level is expected to close a token."""
    rate = model.stage.estimators[0].router.rate if model.stage.estimators else 1.0
    return 0.25 if rate is None else rate


def keys_of(key: Keys, count: int) -> Key[Array, " batch"]:
    """A key for each of so many texts: those given, or one made of `key` and the number of the text.

    Raises `ValueError` for another number of keys.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if not has_many(key):
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
    if key.shape[0] != count:
        raise ValueError(f"there are {key.shape[0]} keys for {count} texts")
    return key


def drawing_keys(keys: Key[Array, " batch"]) -> Key[Array, " batch"]:
    """Of the key of each text, the one that draws its boundaries."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, 0)


@dataclass(frozen=True)
class Scored:
    """How likely a text is after its context: `log_lik` in nats over its `bytes`, and that of each byte.

    `greedy`: whether each of its bytes was the likeliest. `closed_levels`: how many levels closed a token with it, counted from
    the outermost.
    """

    log_lik: float
    bytes: int
    byte_log_lik: np.ndarray
    greedy: bool
    closed_levels: np.ndarray

    @property
    def boundaries(self) -> np.ndarray:
        """Whether the outermost level closed a token with a byte."""
        return self.closed_levels > 0


def score(
    model: UNet,
    texts: Sequence[str | bytes],
    *,
    contexts: Sequence[str | bytes] | None = None,
    key: Keys | None,
    batch: int = 16,
) -> tuple[Scored, ...]:
    r"""$\sum_i \log p(x_i \mid \mathrm{context}, x_{<i})$ of each text, in the order given.

    A text's boundaries, and those of its context, are drawn with its own key (`key`: one for all, or one for each; None: the
    likelier ones), so that its score does not depend on the others; it is the likelihood given these boundaries, which are
    those that `generate` draws with that key. No boundary is dropped. Texts of similar lengths are read together, `batch` at
    a time.

    Raises `ValueError` for another number of contexts or keys than of texts, a batch below 1, and where a text holds the byte
    BOS or EOS.
    """
    contexts = [b""] * len(texts) if contexts is None else contexts
    if len(contexts) != len(texts):
        raise ValueError(f"there are {len(contexts)} contexts for {len(texts)} texts")
    if batch < 1:
        raise ValueError(f"a batch has at least 1 text; got {batch}")
    keys = None if key is None else drawing_keys(keys_of(key, len(texts)))
    before = [as_bytes(context) for context in contexts]
    whole = [context + as_bytes(text) for context, text in zip(before, texts, strict=True)]
    order = sorted(range(len(texts)), key=lambda number: len(whole[number]), reverse=True)
    scored: dict[int, Scored] = {}
    for start in range(0, len(order), batch):
        numbers = order[start : start + batch]
        # Missing texts are empty, so that one program serves all batches of a length.
        some = [whole[number] for number in numbers] + [b""] * (batch - len(numbers))
        own = None if keys is None else keys[jnp.asarray(numbers + numbers[:1] * (batch - len(numbers)))]
        bytes, mask = jnp.asarray(padded(some)), jnp.asarray(_mask(some))
        likelihoods = in_enough_rows(
            bytes.shape[1],
            rate_of(model),
            lambda capacity, bytes=bytes, mask=mask, own=own: _likelihoods(model, bytes, mask, own, capacity),
        )
        results = jax.tree.map(np.asarray, likelihoods)
        for row, number in enumerate(numbers):
            part = slice(len(before[number]), len(whole[number]))
            log_lik = results.log_lik[row, part]
            scored[number] = Scored(
                float(log_lik.sum(dtype=np.float64)),
                log_lik.size,
                log_lik,
                bool(np.all(results.likeliest[row, part])),
                results.closed[row, 1:][part],
            )
    return tuple(scored[number] for number in range(len(texts)))


class Likelihoods(eqx.Module):
    """Of the byte after each row: its log-likelihood in nats and whether it is the likeliest; how many levels closed a token
    with the row, and how many tokens of the outermost had no room."""

    log_lik: Float[Array, "batch length"]
    likeliest: Bool[Array, "batch length"]
    closed: Int[Array, "batch length"]
    overflow: Int[Array, " batch"] | None


@eqx.filter_jit
def _likelihoods(
    model: UNet,
    bytes: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    keys: Key[Array, " batch"] | None,
    capacity: int,
) -> Likelihoods:
    prediction = model(bytes, key=keys, mask=mask, capacities=(capacity,))
    likeliest, levels = jnp.argmax(prediction.logits, axis=-1) == jnp.roll(bytes, -1, axis=1), prediction.levels
    overflow = levels[0].overflow if levels else None
    return Likelihoods(next_byte_log_lik(prediction.logits, bytes), likeliest, closed_levels(levels, mask), overflow)


def as_bytes(text: str | bytes) -> bytes:
    """Text as UTF-8; bytes as they are."""
    return text.encode() if isinstance(text, str) else text
