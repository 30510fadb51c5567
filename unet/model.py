"""The byte-level language model: byte embedding, a stage, output head and early-exit head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key, PRNGKeyArray, PyTree

from estimators.base import VOCAB, AbstractEstimator, Keys, Layout, uniforms_from
from estimators.bounds import Count, Samples, require_within
from estimators.decode_state import AbstractDecodeState, last_positions, update_state
from unet.capacity import smallest_with_room, switch_with_gradient
from unet.config import AbstractShape
from unet.decoding.alphabet import BYTES, Alphabet, byte_alphabet
from unet.hierarchy import AbstractStage, Encoded, StageOutput, StageSampling, repeated, without_copies
from unet.language_model import AbstractLanguageModel
from unet.layers import Linear, RMSNorm
from unet.likelihood import plain_layout
from unet.losses import LossOutput, Prediction, losses
from unet.ngrams import HashedNgrams
from unet.numerics import with_rank_promotion
from unet.wrapped import Positioned


class TextUpdate(eqx.Module):
    """The update of a model's decode state: that of its stage, and the new `bytes`."""

    stage: PyTree[Array]
    bytes: Int[Array, "batch length"]


class TextState(AbstractDecodeState):
    """Decode state of a model: the `stage`'s decode state, the number of bytes so far (`count`), the `keys` that draw
    boundaries (None: greedy), and the `recent` bytes that n-gram embeddings look back at."""

    stage: PyTree[Array]
    count: Int[Array, " batch"]
    keys: Key[Array, " batch"] | None
    recent: Int[Array, "batch reach"] | None = None

    def noise(self, length: int) -> Float[Array, "batch length"] | None:
        """The uniform numbers that draw the outermost level's boundaries at the next `length` bytes; None if greedy."""
        return None if self.keys is None else uniforms_from(self.keys, self.count, length)

    def updated(self, update: TextUpdate, lengths: Int[Array, " batch"]) -> TextState:
        stage, count = update_state(self.stage, update.stage, lengths), self.count + lengths
        recent = None if self.recent is None else last_positions(self.recent, update.bytes, lengths)
        return TextState(stage, count, self.keys, recent)


class Decoded(eqx.Module):
    """The prediction at each new byte, and the `update` of the decode state:
    `estimators.decode_state.update_state(state, update, lengths)` is the state after these bytes."""

    prediction: Prediction
    update: TextUpdate

    @property
    def logits(self) -> Float[Array, "batch length vocab"]:
        return self.prediction.logits


def check_bytes(bytes: Integer[Array, "batch length"], vocab: int = VOCAB) -> Integer[Array, "batch length"]:
    """`bytes` unchanged. Raises `ValueError` unless it is an integer array with the axes batch and length, and for values
    outside 0 … `vocab` - 1: 255, but for a model that reads other marks too. Values are checked only outside of compiled
    functions, where they can be inspected."""
    if not hasattr(bytes, "dtype") or bytes.ndim != 2 or not jnp.issubdtype(bytes.dtype, jnp.integer):
        shape, dtype = getattr(bytes, "shape", type(bytes).__name__), getattr(bytes, "dtype", "")
        raise ValueError(f"bytes must be integers, batch x length (one text: text[None]); got {dtype} {shape}")
    if not isinstance(bytes, jax.core.Tracer) and bytes.size and bytes.dtype != jnp.uint8:
        # NumPy, since jax.numpy would return a tracer while an outer function is being traced.
        low, high = int(np.min(np.asarray(bytes))), int(np.max(np.asarray(bytes)))
        if low < 0 or high >= vocab:
            raise ValueError(
                f"{'bytes' if vocab == VOCAB else 'symbols'} must lie between 0 and {vocab - 1}; got {low if low < 0 else high}"
            )
    return bytes


def _at_most_float32(leaf: PyTree) -> PyTree:
    """Parameters stay float32 under `jax_enable_x64`."""
    is_float64 = isinstance(leaf, jax.Array) and leaf.dtype == jnp.float64
    return leaf.astype(jnp.float32) if is_float64 else leaf


def _bounds(capacities: Sequence[int] | int) -> tuple[int, ...]:
    """Capacities as a tuple; a single one becomes a tuple of one. Raises `ValueError` for one that is no number of tokens."""
    bounds = (capacities,) if isinstance(capacities, int) else tuple(capacities)
    for capacity in bounds:
        require_within("a capacity", capacity, Count)
    return bounds


def _choices(capacities: Sequence[int | Sequence[int]] | int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The capacities that the outermost level may choose from (empty: no bound), and the bound of every level.

    Raises `ValueError` if they do not ascend, or if an inner level has several.
    """
    levels = [_bounds(level) for level in ([capacities] if isinstance(capacities, int) else capacities)]
    if any(len(level) > 1 for level in levels[1:]):
        raise ValueError("only the outermost level can choose between several capacities")
    if any(not level or list(level) != sorted(set(level)) for level in levels):
        raise ValueError(f"capacities to choose from must ascend; got {levels}")
    return (levels[0] if levels else ()), tuple(level[-1] for level in levels)


class UNet(AbstractLanguageModel):
    """A byte-level autoregressive U-Net whose token boundaries an estimator draws (SFE section 2.2).

    `model(bytes, key=key)` predicts; `model.loss(bytes, key=key)` is the training loss; `model.decode` predicts at the next
    bytes from a decode state (`unet.generate` is the decoding loop). Without a `head` the embedding is tied: one array, whose
    gradient is the sum over both uses. A `vocab` of more than 256 has other marks behind the bytes, such as those of a published
    model, which are read and scored, and never drawn; or it is the part of a `TokenModel` that reads tokens: what is said of
    bytes here is true of them.
    """

    embedding: Float[Array, "vocab dim"]
    stage: AbstractStage
    norm: RMSNorm | None
    head: Linear | None
    early_norm: RMSNorm | None
    early_head: Linear | None
    compute: Literal["float32", "bfloat16"] = eqx.field(static=True)
    early_exit_fraction: float = eqx.field(static=True)
    ngrams: HashedNgrams | None = None

    @with_rank_promotion
    def __init__(
        self,
        config: AbstractShape,
        estimator: AbstractEstimator | Sequence[AbstractEstimator] | None,
        *,
        key: PRNGKeyArray,
        vocab: int = VOCAB,
    ):
        """`estimator`: one for each token level, the outermost first; None for a purely byte-level model.

        The early-exit head starts as a copy of the output head (SFE section 2.4) and exists only if an objective needs it.
        Raises `ValueError` if the shape has another number of token levels, or another width than a router was built for.
        """
        estimators = [estimator] if isinstance(estimator, AbstractEstimator) else list(estimator or ())
        parts = jax.tree.map(_at_most_float32, config.parts(estimators, key=key, vocab=vocab))
        for number, (router, dim) in enumerate(zip((one.router for one in estimators), config.widths, strict=False)):
            if router.dim not in (None, dim):
                raise ValueError(
                    f"the router of level {number} reads hidden states of width {router.dim}, but this shape has {dim} there"
                )
        self.embedding, self.stage, self.norm, self.head = parts.embedding, parts.stage, parts.norm, parts.head
        early = any(one.objective.needs_early_exit for one in estimators)
        self.early_norm = RMSNorm(self.embedding.shape[1]) if early else None
        self.early_head = jax.tree.map(lambda leaf: leaf, self.output_head) if early else None
        self.compute = config.compute
        self.early_exit_fraction = config.early_exit_fraction
        self.ngrams = parts.ngrams

    @property
    def unet(self) -> UNet:
        return self

    @property
    def symbols(self) -> Sequence[bytes]:
        # Other marks than bytes stand for no text.
        return (*BYTES, *(b"",) * (self.embedding.shape[0] - VOCAB))

    @property
    def alphabet(self) -> Alphabet:
        return byte_alphabet(self.embedding.shape[0] - VOCAB)

    @property
    def levels(self) -> int:
        return len(self.stage.estimators)

    def require_positions(self, count: int) -> None:
        """Raise `ValueError` for a model with learned positions that has fewer than `count`."""
        if isinstance(self.stage, Positioned) and count > self.stage.table.shape[0]:
            raise ValueError(
                f"the model has embeddings of {self.stage.table.shape[0]} positions, and a text of up to {count} tokens needs "
                "more: use shorter texts (--length, --context or --max-bytes)"
            )

    def encode(self, text: bytes) -> Int[np.ndarray, " symbols"]:
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def inputs(self, batch: Mapping[str, np.ndarray], *, shortest: int = 0) -> dict[str, PyTree[np.ndarray]]:
        return {name: batch[name] for name in ("bytes", "segments", "mask")}

    def batch_loss(
        self,
        batch: Mapping[str, PyTree[Array]],
        *,
        key: PRNGKeyArray | None,
        target_rate: Float[Array, ""] | None = None,
        capacities: Sequence[int | Sequence[int]] = (),
        samples: int = 1,
    ) -> LossOutput:
        return self.loss(
            batch["bytes"],
            key=key,
            segments=batch["segments"],
            mask=batch["mask"],
            target_rate=target_rate,
            capacities=capacities,
            samples=samples,
        )

    @with_rank_promotion
    def __call__(
        self,
        bytes: Integer[Array, "batch length"],
        *,
        key: Keys | None = None,
        actions: Sequence[Bool[Array, "batch _"]] | Bool[Array, "batch length"] = (),
        segments: Int[Array, "batch length"] | None = None,
        mask: Bool[Array, "batch length"] | None = None,
        target_rate: Float[Array, ""] | None = None,
        capacities: Sequence[int] | int = (),
        samples: int = 1,
        training: bool = False,
    ) -> Prediction:  # Nine parameters, since few are used at once: an object would hold the same names.
        """Predict the next byte at every position.

        `key` draws the boundaries (None: greedy; one key for all sequences, or one each: see `SamplingOptions`); `actions`
        prescribes them level by level. `segments` numbers the documents packed into a sequence; `mask` is False on padding.
        `capacities` bounds the tokens of each level; without it no boundary is dropped. `target_rate` replaces the rate that
        the estimator was built for. `samples` draws that many sets of boundaries for each sequence and returns as many adjacent
        rows of the batch. A single array of actions, or a single capacity, is for the outermost level. Raises `ValueError` for
        invalid bytes.
        """
        require_within("samples", samples, Samples)
        layout = plain_layout(check_bytes(bytes, self.embedding.shape[0]), segments, mask)
        actions = (actions,) if isinstance(actions, jax.Array | np.ndarray) else tuple(actions)
        sampling = StageSampling(key, actions, target_rate, _bounds(capacities), samples, training)
        return self.predict(self.stage(self.embed(layout), layout, sampling), samples=samples)

    @with_rank_promotion
    def init_state(self, batch: int, keys: Key[Array, " batch"] | None = None) -> TextState:
        """The decode state of `batch` texts before their first byte; `keys` draw their boundaries (None: greedy)."""
        recent = None if self.ngrams is None else jnp.zeros((batch, self.ngrams.reach), jnp.int32)
        stage = self.stage.init_state(batch, self.embedding.shape[1])
        return TextState(stage, jnp.zeros((batch,), jnp.int32), keys, recent)

    @with_rank_promotion
    def decode(
        self,
        bytes: Integer[Array, "batch length"],
        state: TextState,
        *,
        mask: Bool[Array, "batch length"] | None = None,
        capacities: Sequence[int] | int = (),
        noise: Float[Array, "batch length"] | None = None,
    ) -> Decoded:
        """Predict at the next bytes of each text; `mask` is True at bytes and False at padding, which comes last.

        From `init_state` this is prefill; one byte is a decoding step. A text gets the same predictions and boundaries however
        it is split into calls, and the same as from `__call__` with its key. KV caches of the token level get one slot for each
        token position of the first call; `unet.decoding.kv_cache.with_room` adds more. If a text's cache is full, its logits
        are NaN. If a level overflows `capacities`, the state must not be used. `noise`: what `TextState.noise` returns for
        these bytes, which is cheaper computed for many bytes at once.
        """
        positions = state.count[:, None] + jnp.arange(bytes.shape[1], dtype=jnp.int32)
        mask = jnp.ones(bytes.shape, bool) if mask is None else mask
        layout = Layout(bytes.astype(jnp.int32), positions, jnp.zeros_like(positions), mask, state.count)
        sampling = StageSampling(state.keys, capacities=_bounds(capacities), noise=noise)
        output = self.stage(self.embed(layout, state.recent), layout, sampling, state.stage)
        return Decoded(self.predict(output), TextUpdate(output.update, layout.bytes))

    def predict(
        self, output: StageOutput, *, samples: int = 1, early_positions: Int[Array, " positions"] | None = None
    ) -> Prediction:
        """Apply the heads to the stage's output for `samples` of each sequence, the early-exit head only at `early_positions` if
        they are given."""
        early_logits = None
        with jax.named_scope("heads"):
            if self.early_head is not None and self.early_norm is not None:
                # The encoder's states, which all samples of a sequence share.
                hidden = without_copies(output.levels[0].hidden, samples)
                hidden = hidden if early_positions is None else hidden[:, early_positions]
                early_logits = self.early_head.in_float32(self.early_norm(hidden))
            return Prediction(self.logits(output.hidden), early_logits, output.levels, early_positions, output.experts)

    @property
    def output_head(self) -> Linear:
        """The head that predicts the next byte: the model's own, or its transposed embedding."""
        return Linear.of(self.embedding.T) if self.head is None else self.head

    def logits(self, hidden: Float[Array, "batch length dim"]) -> Float[Array, "batch length vocab"]:
        """Final norm and output head, applied to the stage's hidden states."""
        return self.output_head.in_float32(hidden if self.norm is None else self.norm(hidden))

    def early_positions(self, length: int, key: PRNGKeyArray | None) -> Int[Array, " positions"] | None:
        """Random positions at which the early-exit head predicts in a training step. None means all, as without a key."""
        count = round(self.early_exit_fraction * length)
        if self.early_head is None or key is None or count >= length:
            return None
        return jax.random.permutation(jax.random.fold_in(key, 2), length)[: max(count, 1)]

    def embed(
        self, layout: Layout, before: Int[Array, "batch reach"] | None = None
    ) -> Float[Array, "batch length dim"]:
        """Byte embeddings, plus n-gram embeddings if there are any, in the compute dtype. `before`: the preceding bytes, which
        n-grams look back at."""
        with jax.named_scope("embed"):
            embedded = self.embedding[layout.bytes]
            if self.ngrams is not None:
                embedded = embedded + self.ngrams(layout.bytes, layout.document_positions, before)
            return embedded.astype(self.compute)

    @with_rank_promotion
    def loss(
        self,
        bytes: Integer[Array, "batch length"],
        *,
        key: PRNGKeyArray | None,
        segments: Int[Array, "batch length"] | None = None,
        mask: Bool[Array, "batch length"] | None = None,
        target_rate: Float[Array, ""] | None = None,
        capacities: Sequence[int | Sequence[int]] | int = (),
        samples: int = 1,
        training: bool = True,
    ) -> LossOutput:
        """The language-model loss plus the objectives' losses of all levels (SFE eq. 22).

        If the outermost of `capacities` is a sequence of several in ascending order, the token level runs at the smallest one
        that fits every sequence of the batch; only the largest drops boundaries. All of them are in one compiled program, so it
        serves every rate.

        Derivatives are in reverse mode: `jax.jvp` and `jax.jacfwd` raise `TypeError`, except for a shape with
        `implementation="native"` and no choice of capacities. A Hessian-vector product is the gradient of a product, as
        `jax.grad(lambda p: jnp.vdot(jax.grad(loss)(p), v))(params)`, for any capacities, where no Pallas kernel runs (on a CPU,
        or with `implementation` "xla" or "native").

        Raises `ValueError` for invalid bytes, for capacities that do not ascend, and for capacities or samples below 1.
        """
        require_within("samples", samples, Samples)
        choices, bounds = _choices(capacities)
        layout = plain_layout(check_bytes(bytes, self.embedding.shape[0]), segments, mask)
        sampling = StageSampling(key, (), target_rate, bounds, samples, training)
        encoded = self.stage.encode(self.embed(layout), layout, sampling)

        def loss_at(capacity: int | None):
            def branch(operands: tuple[UNet, Encoded, StageSampling, Layout]) -> tuple[Float[Array, ""], LossOutput]:
                model, encoded, sampling, layout = operands
                early = model.early_positions(layout.bytes.shape[1], sampling.key) if sampling.training else None
                decoded = model.stage.decode(encoded, sampling, capacity=capacity)
                prediction = model.predict(decoded, samples=samples, early_positions=early)
                with jax.named_scope("loss"):
                    output = model.losses(
                        prediction,
                        repeated(layout, samples),
                        target_rate=sampling.target_rate,
                        samples=samples,
                        capacity=capacity,
                    )
                return output.loss, output

            return branch

        which = smallest_with_room(encoded.most_tokens, choices)
        # There are no more tokens than bytes.
        branches = [loss_at(min(capacity, bytes.shape[1])) for capacity in choices] or [loss_at(None)]
        loss, output = switch_with_gradient(which, branches, (self, encoded, sampling, layout))
        # `output.loss` comes from the auxiliary output and carries no gradient.
        return dataclasses.replace(output, loss=loss)

    @with_rank_promotion
    def losses(
        self,
        prediction: Prediction,
        layout: Layout,
        *,
        target_rate: Float[Array, ""] | None = None,
        samples: int = 1,
        capacity: int | None = None,
    ) -> LossOutput:
        """The losses of a given prediction. `layout` has one row for each row of its batch; `capacity`: tokens per sequence
        that the outermost token level could hold (None: as many as there are bytes)."""
        objectives = [estimator.objective for estimator in self.stage.estimators]
        return losses(prediction, objectives, layout, target_rate=target_rate, samples=samples, capacity=capacity)
