"""Prefill and scoring: decode states of a batch of texts, and their log-probabilities."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol, TypeVar, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from estimators.base import BOS, EOS, Keys, has_many
from estimators.bounds import Within, require_within
from estimators.decode_state import update_state
from estimators.keys import threefry_keys
from unet.decoding.alphabet import at_last_bytes
from unet.decoding.kv_cache import rounded_up
from unet.hierarchy import boundary_depth
from unet.language_model import AbstractLanguageModel
from unet.likelihood import next_logprobs
from unet.local_devices import LocalDevices, by_row
from unet.losses import Prediction
from unet.model import TextState, UNet
from unet.numerics import with_rank_promotion

Texts = Annotated[int, Within(1, 2**16)]
"""Computed beside each other."""


@runtime_checkable
class HasOverflow(Protocol):
    """A result computed within a capacity, with the number of dropped boundaries."""

    @property
    def overflow(self) -> Int[Array, " batch"] | None: ...


Result = TypeVar("Result", bound=HasOverflow)


def with_enough_capacity(length: int, rate: float, compute: Callable[[int], Result]) -> Result:
    """`compute(capacity)` for texts of `length` bytes, of which a fraction of about `rate` close a token. As long as boundaries
    are dropped, it is computed again with twice the capacity."""
    capacity = min(length, rounded_up(math.ceil(1.3 * rate * length)))
    while True:
        result = compute(capacity)
        if capacity == length or result.overflow is None or not np.any(result.overflow):
            return result
        capacity = min(length, 2 * capacity)


class Prefilled(eqx.Module):
    """Result of a prefill: the `logits` of the byte after each text, the boundary `depth` at each position, the number of
    boundaries dropped (`overflow`, None without a token level), and the decode `state`."""

    logits: Float[Array, "batch vocab"]
    depth: Int[Array, "batch length"]
    overflow: Int[Array, " batch"] | None
    state: TextState


@by_row
@with_rank_promotion
def _prefill(
    model: UNet,
    bytes: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    keys: Key[Array, " batch"] | None,
    capacity: int,
) -> Prefilled:
    state, lengths = model.init_state(bytes.shape[0], keys), jnp.sum(mask, axis=1, dtype=jnp.int32)
    decoded = model.decode(bytes, state, mask=mask, capacities=(capacity,))
    levels, last = decoded.prediction.levels, lengths[:, None, None] - 1
    logits = jnp.take_along_axis(decoded.logits, last, axis=1, mode="clip")[:, 0]
    overflow = levels[0].overflow if levels else None
    return Prefilled(logits, boundary_depth(levels, mask), overflow, update_state(state, decoded.update, lengths))


@dataclass(frozen=True)
class ReadyTexts:
    """Prefilled texts, and the `symbols` of each without its BOS."""

    symbols: Sequence[Int[np.ndarray, " _"]]
    prefilled: Prefilled


def prefill(model: AbstractLanguageModel, texts: Sequence[bytes], keys: Key[Array, " batch"] | None) -> ReadyTexts:
    """Prefill texts, each after a BOS, with boundaries drawn by `keys` (None: greedy). No boundary is dropped.

    Raises `ValueError` if a text contains the byte BOS or EOS.
    """
    symbols = encoded(model, texts)
    devices = LocalDevices.of(len(texts), model)
    unet, (rows, mask, keys) = (
        devices.everywhere(model.unet),
        devices.rows((*map(jnp.asarray, padded(symbols, model.alphabet.bos)), keys)),
    )
    compute = functools.partial(_prefill, unet, rows, mask, keys)
    prefilled = with_enough_capacity(rows.shape[1], rate_of(unet), compute)
    return ReadyTexts(symbols, prefilled)


def encoded(model: AbstractLanguageModel, texts: Sequence[bytes]) -> list[Int[np.ndarray, " _"]]:
    """The symbols of texts. Raises `ValueError` if one contains the byte BOS or EOS."""
    for number, text in enumerate(texts):
        if BOS in text or EOS in text:
            raise ValueError(
                f"text {number} holds the byte {BOS} or {EOS}, which mark the ends of texts and occur in no UTF-8"
            )
    return [model.encode(text) for text in texts]


def padded(
    texts: Sequence[Int[np.ndarray, " _"]], bos: int
) -> tuple[Int[np.ndarray, "batch length"], Bool[np.ndarray, "batch length"]]:
    """Texts as rows of symbols, each after a BOS, padded with zeros to one of a few lengths; and a mask, True without padding."""
    lengths = np.array([1 + len(text) for text in texts])
    rows = np.zeros((len(texts), rounded_up(int(lengths.max()))), np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[0], row[1 : 1 + len(text)] = bos, text
    return rows, np.arange(rows.shape[1]) < lengths[:, None]


def depth_of_bytes(
    model: AbstractLanguageModel, symbols: Int[np.ndarray, " symbols"], depth: Int[np.ndarray, "*more"]
) -> Int[np.ndarray, " bytes"]:
    """How many levels closed a token at each byte of some symbols, from the depth at each symbol, behind which may be padding. At
    its last byte a token of a tokenizer is one level more."""
    return at_last_bytes(depth[: len(symbols)] + (model.levels - len(model.estimators)), sizes_of(model, symbols))


def sizes_of(model: AbstractLanguageModel, symbols: Int[np.ndarray, " symbols"]) -> Int[np.ndarray, " symbols"]:
    """How many bytes each symbol has."""
    own = model.symbols
    return np.array([len(own[one]) for one in symbols], np.int64)


def rate_of(model: UNet) -> float:
    """The expected number of token positions per byte: the rate of the outermost level, or 1 without a token level, where every
    byte takes a slot of the KV caches."""
    rate = model.stage.estimators[0].router.rate if model.stage.estimators else 1.0
    return 0.25 if rate is None else rate


def keys_of(key: Keys, count: int) -> Key[Array, " batch"]:
    """One Threefry key for each text: those given, or `key` with the number of the text folded in.

    Raises `ValueError` for another number of keys, and `TypeError` for what is no key.
    """
    if not isinstance(key, jax.Array):
        raise TypeError(f"a key must be one of JAX, such as jax.random.key(0); got a {type(key).__name__}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim > 1:
        raise ValueError(f"there must be one key, or one for each text; got keys of shape {key.shape}")
    key = threefry_keys(key)
    if not has_many(key):
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
    if key.shape[0] != count:
        raise ValueError(f"there are {key.shape[0]} keys for {count} texts")
    return key


def drawing_keys(keys: Key[Array, " batch"]) -> Key[Array, " batch"]:
    """The keys that draw boundaries, derived from the keys of the texts."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, 0)


@dataclass(frozen=True)
class Scored:
    """Score of a text after its context: its `log_prob` in nats, its length in `bytes`, and the `logprobs` of the bytes.

    `greedy`: whether every byte (or token) was the most likely one. `boundary_depth`: how many levels, counted from the
    outermost, closed a token at each byte.
    """

    log_prob: float
    bytes: int
    logprobs: np.ndarray
    greedy: bool
    boundary_depth: np.ndarray

    @property
    def boundaries(self) -> np.ndarray:
        """Whether the outermost level closed a token at each byte."""
        return self.boundary_depth > 0


def score(
    model: AbstractLanguageModel,
    texts: Sequence[str | bytes] | str | bytes,
    *,
    contexts: Sequence[str | bytes] | str | bytes | None = None,
    key: Keys | None,
    batch: int = 16,
) -> tuple[Scored, ...]:
    r"""$\sum_i \log p(x_i \mid \mathrm{context}, x_{<i})$ of each text (or of a single one), in the order given.

    The boundaries of a text and its context are drawn with the text's own key (`key`: one for all, or one each; None: greedy),
    so its score does not depend on the other texts. The score is the log-probability given these boundaries, which are the ones
    that `generate` draws with the same key. No boundary is dropped. Texts of similar lengths are batched, `batch` at a time.

    A model of tokens is given the tokens of the context, then those of the text, which begin with it. The log-probability of a
    token stands at its last byte, 0 at the others.

    Raises `ValueError` if the number of contexts or keys differs from that of texts, for a batch outside 1 … 65536, if a text
    contains the byte BOS or EOS, and if it has more tokens than the model has learned positions.
    """
    texts = texts_as_bytes(texts)
    prefixes = [b""] * len(texts) if contexts is None else texts_as_bytes(contexts)
    if len(prefixes) != len(texts):
        raise ValueError(f"there are {len(prefixes)} contexts for {len(texts)} texts")
    keys = None if key is None else drawing_keys(keys_of(key, len(texts)))
    before, own = encoded(model, prefixes), encoded(model, texts)
    whole = [np.concatenate(parts) for parts in zip(before, own, strict=True)]
    model.unet.require_positions(1 + max((len(one) for one in whole), default=0))
    scored: dict[int, Scored] = {}
    for number, result in in_batches(whole, keys, batch, model, _likelihoods):
        part = slice(len(before[number]), len(whole[number]))
        log_prob = np.asarray(result.log_prob[part])
        scored[number] = Scored(
            float(log_prob.sum(dtype=np.float64)),
            len(texts[number]),
            at_last_bytes(log_prob, sizes_of(model, own[number])),
            bool(np.all(result.most_likely[part])),
            depth_of_bytes(model, own[number], np.asarray(result.depth[1:][part])),
        )
    return tuple(scored[number] for number in range(len(texts)))


def in_batches(
    texts: Sequence[Int[np.ndarray, " _"]],
    keys: Key[Array, " texts"] | None,
    batch: int,
    model: AbstractLanguageModel,
    compute: Callable[
        [UNet, Int[Array, "batch length"], Bool[Array, "batch length"], Key[Array, " batch"] | None, int], Result
    ],
) -> Iterator[tuple[int, Result]]:
    """The number of each text, given as its symbols, and its row of what `compute` makes of the model and the symbols, the mask
    and the keys of its batch, as NumPy arrays, in any order. Texts of similar lengths are batched, and the devices of this
    process share each batch. No boundary is dropped.

    Raises `ValueError` for a batch outside 1 … 65536.
    """
    require_within("batch", batch, Texts)
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]), reverse=True)
    devices = LocalDevices.of(batch, model)
    unet = devices.everywhere(model.unet)
    for start in range(0, len(order), batch):
        numbers = order[start : start + batch]
        # The last batch is filled with empty texts, so that one program serves all batches of a length.
        filled = [texts[number] for number in numbers] + [texts[0][:0]] * (batch - len(numbers))
        own_keys = None if keys is None else keys[jnp.asarray(numbers + numbers[:1] * (batch - len(numbers)))]
        symbols, mask, own_keys = devices.rows((*map(jnp.asarray, padded(filled, model.alphabet.bos)), own_keys))
        computed = functools.partial(compute, unet, symbols, mask, own_keys)
        results = with_enough_capacity(symbols.shape[1], rate_of(unet), computed)
        rows = jax.tree.map(np.asarray, results)
        for row, number in enumerate(numbers):
            yield number, jax.tree.map(operator.itemgetter(row), rows)


class Likelihoods(eqx.Module):
    """The log-probability in nats of the byte after each position, and whether it is the most likely one; the boundary `depth`
    at each position; the number of boundaries that the outermost level dropped (`overflow`, None without a token level)."""

    log_prob: Float[Array, "batch length"]
    most_likely: Bool[Array, "batch length"]
    depth: Int[Array, "batch length"]
    overflow: Int[Array, " batch"] | None


def likelihoods(
    prediction: Prediction, bytes: Int[Array, "batch length"], mask: Bool[Array, "batch length"]
) -> Likelihoods:
    """The likelihoods of the bytes that were predicted; `mask` is False at padding."""
    levels, logits = prediction.levels, prediction.logits
    most_likely = jnp.argmax(logits, axis=-1) == jnp.roll(bytes, -1, axis=1)
    overflow = levels[0].overflow if levels else None
    return Likelihoods(next_logprobs(logits, bytes), most_likely, boundary_depth(levels, mask), overflow)


@by_row
@with_rank_promotion
def _likelihoods(
    model: UNet,
    bytes: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    keys: Key[Array, " batch"] | None,
    capacity: int,
) -> Likelihoods:
    return likelihoods(model(bytes, key=keys, mask=mask, capacities=(capacity,)), bytes, mask)


def texts_as_bytes(texts: Sequence[str | bytes] | str | bytes) -> list[bytes]:
    """Strings encoded as UTF-8, bytes unchanged; a single text becomes a list of one. Raises `TypeError` for anything else and
    `ValueError` for a string that UTF-8 cannot hold."""
    texts = [texts] if isinstance(texts, str | bytes | bytearray) else texts
    return [_as_bytes(text, number) for number, text in enumerate(texts)]


def _as_bytes(text: object, number: int) -> bytes:
    if isinstance(text, bytes | bytearray):
        return bytes(text)
    if not isinstance(text, str):
        raise TypeError(f"text {number} must be a string or bytes; got a {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text {number} holds half a surrogate pair at {error.start}, which UTF-8 cannot hold"
        ) from None
