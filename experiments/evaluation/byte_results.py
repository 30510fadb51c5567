"""One forward pass over a batch of text, as results of its bytes."""

from __future__ import annotations

import abc
from typing import final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from estimators import Layout, equations
from estimators.sharding import DATA
from unet.hierarchy import Hierarchy, StageSampling
from unet.language_model import AbstractLanguageModel
from unet.likelihood import continues, next_logprobs, plain_layout
from unet.local_devices import LocalDevices, by_row
from unet.losses import early_log_prob
from unet.model import UNet
from unet.tokens.batch import TokenBatch, at_last_byte, at_predictions
from unet.tokens.model import TokenModel


def is_off_policy(model: AbstractLanguageModel) -> bool:
    """Whether the first level, if that is not the tokens of a tokenizer, trains on boundaries of another router."""
    return isinstance(model, UNet) and any(estimator.router.off_policy for estimator in model.estimators[:1])


class ByteResults(eqx.Module):
    """Per-byte results of a batch. Without a token level there are no boundaries and the probabilities are 0."""

    log_prob: Float[Array, "batch length"]
    early_log_prob: Float[Array, "batch length"] | None
    scored: Bool[Array, "batch length"]
    probs: Float[Array, "batch length"]
    entropy: Float[Array, "batch length"]
    """Entropy of the policy in nats; defined only where `decided`."""
    decided: Bool[Array, "batch length"]
    sampled: Bool[Array, "batch length"]
    greedy: Bool[Array, "batch length"]
    valid: Bool[Array, "batch length"]
    free: Bool[Array, "batch length"]
    """True at valid positions where no boundary is forced."""
    overflow: Int[Array, " batch"]
    """Number of dropped boundaries."""
    drawn: Bool[Array, "batch length"]
    """The boundaries before any were dropped."""
    as_trained: Bool[Array, "batch length"]
    """Boundaries of the router that training follows, for an off-policy router; all False for other routers."""
    tokens: Int[Array, "batch levels"]
    """Number of tokens at each level of the hierarchy, the outermost first."""
    constrained: Bool[Array, "batch length"] | None = None
    """Where a constraint forced or forbade a boundary; None without constraints."""


Actions = tuple[Bool[Array, "batch length"], ...]
"""Boundaries that are prescribed, of the outermost level; none where they are drawn."""


class AbstractPass(abc.ABC):
    """Forward passes of one model, on some devices."""

    @property
    @abc.abstractmethod
    def off_policy(self) -> bool:
        """`is_off_policy` of the model."""

    @abc.abstractmethod
    def results(self, layout: Layout, key: PRNGKeyArray, capacity: int | None, actions: Actions = ()) -> ByteResults:
        """`evaluate_batch` of the model."""


@final
class LocalPass(AbstractPass):
    """Passes on the devices of this process, which share the rows."""

    def __init__(self, model: AbstractLanguageModel):
        self._model = model
        self._placed: dict[LocalDevices, AbstractLanguageModel] = {}

    @property
    def off_policy(self) -> bool:
        return is_off_policy(self._model)

    def results(self, layout: Layout, key: PRNGKeyArray, capacity: int | None, actions: Actions = ()) -> ByteResults:
        devices = LocalDevices.of(layout.bytes.shape[0], self._model, DATA)
        if devices not in self._placed:
            self._placed[devices] = devices.everywhere(self._model)
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            # Its two numbers are no rows.
            key = jax.random.wrap_key_data(key)
        return evaluate_batch(self._placed[devices], devices.rows(layout), key, capacity, devices.rows(actions))


def evaluate_batch(
    model: AbstractLanguageModel,
    layout: Layout,
    key: PRNGKeyArray,
    capacity: int | None,
    actions: Actions = (),
) -> ByteResults:
    """`evaluate_bytes`, or of a model of tokens `evaluate_tokens`, compiled. Raises `ValueError` for `actions` of a model of
    tokens."""
    return evaluate_inputs(model, layout, tokens_of(model, layout, actions), key, capacity, actions)


def tokens_of(model: AbstractLanguageModel, layout: Layout, actions: Actions) -> TokenBatch | None:
    """What a model of tokens reads of a batch; None for a model of bytes. Raises `ValueError` for `actions` of a model of
    tokens."""
    if not isinstance(model, TokenModel):
        return None
    if actions:
        raise ValueError("the tokens of a tokenizer are given: no other boundaries can be prescribed")
    rows = {name: np.asarray(getattr(layout, name)) for name in ("bytes", "segments", "mask")}
    return jax.tree.map(jnp.asarray, model.inputs(rows)["tokens"])


@by_row
def evaluate_inputs(
    model: AbstractLanguageModel,
    layout: Layout,
    tokens: TokenBatch | None,
    key: PRNGKeyArray,
    capacity: int | None,
    actions: Actions,
) -> ByteResults:
    """`evaluate_batch` of a batch and its `tokens`."""
    if tokens is not None and isinstance(model, TokenModel):
        return evaluate_tokens(model, layout, tokens, key)
    return evaluate_bytes(model.unet, layout, key, capacity, actions)


def evaluate_tokens(model: TokenModel, layout: Layout, tokens: TokenBatch, key: PRNGKeyArray) -> ByteResults:
    """One forward pass of a model of tokens with sampled boundaries, as results of bytes: what belongs to a token stands at its
    last byte, or where that is predicted. There is a boundary of the outermost level at the last byte of every token."""
    ids, segments, mask = (jnp.asarray(part) for part in (tokens.ids, tokens.segments, tokens.mask))
    prediction = model.inner(ids, key=key, segments=segments, mask=mask)
    of_tokens, length = plain_layout(ids, segments, mask), layout.bytes.shape[1]
    early = early_log_prob(prediction, of_tokens)
    ends = at_last_byte(tokens, mask.astype(jnp.int32), length) > 0
    counts = [jnp.sum(mask, axis=1, dtype=jnp.int32), *(level.lengths for level in prediction.levels)]
    none, nothing = jnp.zeros_like(layout.mask), jnp.zeros(layout.mask.shape, jnp.float32)
    return ByteResults(
        log_prob=at_predictions(tokens, next_logprobs(prediction.logits, ids), length),
        early_log_prob=None if early is None else at_predictions(tokens, early, length),
        scored=continues(layout),
        probs=ends.astype(jnp.float32),
        entropy=nothing,
        decided=none,
        sampled=ends,
        greedy=ends,
        valid=layout.mask,
        free=layout.mask & ~layout.starts,
        overflow=jnp.zeros((layout.mask.shape[0],), jnp.int32),
        drawn=ends,
        as_trained=none,
        tokens=jnp.stack(counts, axis=1),
    )


def evaluate_bytes(
    model: UNet,
    layout: Layout,
    key: PRNGKeyArray,
    capacity: int | None,
    actions: Actions = (),
) -> ByteResults:
    """One forward pass with sampled boundaries, or with `actions` as boundaries. Greedy boundaries are drawn as well, but not
    used. `capacity`: maximum tokens per sequence; with None no boundary is dropped."""
    capacities = () if capacity is None else (capacity,)
    mask = layout.mask
    prediction = model(
        layout.bytes, key=key, actions=actions, segments=layout.segments, mask=mask, capacities=capacities
    )
    log_prob = next_logprobs(prediction.logits, layout.bytes)
    early = early_log_prob(prediction, layout)
    scored, no_boundaries = continues(layout), jnp.zeros_like(mask)
    if not prediction.levels or not isinstance(model.stage, Hierarchy):
        zeros, no_overflow = jnp.zeros_like(log_prob), jnp.zeros(mask.shape[0], jnp.int32)
        tokens = jnp.zeros((mask.shape[0], 0), jnp.int32)
        return ByteResults(
            *(log_prob, early, scored, zeros, zeros, no_boundaries, no_boundaries, no_boundaries),
            *(mask, no_boundaries, no_overflow, no_boundaries, no_boundaries),
            tokens,
        )
    level = prediction.levels[0]
    greedy = model.stage.boundaries(level.hidden, layout, StageSampling()).actions
    as_trained = no_boundaries
    if is_off_policy(model):
        as_trained = model.stage.boundaries(level.hidden, layout, StageSampling(key, training=True)).actions
    boundaries = level.boundaries
    return ByteResults(
        log_prob,
        early,
        scored,
        boundaries.probs,
        equations.bernoulli_entropy(boundaries.logits),
        boundaries.decided,
        boundaries.actions,
        greedy,
        mask,
        mask & ~layout.starts,
        level.overflow,
        level.drawn,
        as_trained,
        jnp.stack([one.lengths for one in prediction.levels], axis=1),
        boundaries.constrained,
    )
