"""The byte-level language model: embedding, a stage, two heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, Key, PRNGKeyArray, PyTree

from estimators.base import AbstractEstimator, AbstractMemory, Keys, Layout, uniforms_from, written
from unet.buckets import chosen, smallest_with_room
from unet.config import AbstractShape
from unet.layers import Linear, RMSNorm
from unet.likelihood import plain_layout
from unet.losses import LossOutput, Prediction, losses
from unet.ngrams import HashedNgrams
from unet.stage import AbstractStage, Begun, Drawing, StageOutput, repeated


class TextChange(eqx.Module):
    """How what a model keeps changes: its stage's memory, and the byte that was read."""

    stage: PyTree[Array]
    bytes: Int[Array, "batch 1"]


class TextState(AbstractMemory):
    """What a model keeps of the first bytes of some texts: its `stage`'s memory, how many there were (`count`), the `keys` that
    draw boundaries (None: the likelier action), and the `recent` bytes that embeddings of n-grams look back at."""

    stage: PyTree[Array]
    count: Int[Array, " batch"]
    keys: Key[Array, " batch"] | None
    recent: Int[Array, "batch reach"] | None = None

    def noise(self, length: int) -> Float[Array, "batch length"] | None:
        """The uniform numbers with which the outermost level draws at the next `length` bytes; None where it does not draw."""
        return None if self.keys is None else uniforms_from(self.keys, self.count, length)

    def written(self, change: TextChange, advance: Bool[Array, " batch"]) -> TextState:
        recent = self.recent
        if recent is not None:
            recent = written(recent, jnp.concatenate([recent[:, 1:], change.bytes], axis=1), advance)
        count = self.count + advance.astype(jnp.int32)
        return TextState(written(self.stage, change.stage, advance), count, self.keys, recent)


class Prefilled(eqx.Module):
    """What was predicted at each of the first bytes, and what `UNet.step` needs to go on."""

    prediction: Prediction
    state: TextState

    @property
    def logits(self) -> Float[Array, "batch length vocab"]:
        return self.prediction.logits


class NextByte(eqx.Module):
    """Logits of the byte after the next one, whether each level closed a token (the outermost first), and how the state
    changes: `estimators.base.written(state, change, advance)` is the state after it."""

    logits: Float[Array, "batch vocab"]
    closed: tuple[Bool[Array, " batch"], ...]
    change: TextChange


def _sizes(capacities: Sequence[int | Sequence[int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes that the outermost level may choose from (none: no bound), and the bound of every level.

    Raises `ValueError` where they do not ascend, and for several at an inner level.
    """
    levels = [(size,) if isinstance(size, int) else tuple(size) for size in capacities]
    if any(len(sizes) > 1 for sizes in levels[1:]):
        raise ValueError("only the outermost level can choose between several capacities")
    if any(not sizes or list(sizes) != sorted(set(sizes)) for sizes in levels):
        raise ValueError(f"capacities to choose from must ascend; got {levels}")
    return (levels[0] if levels else ()), tuple(sizes[-1] for sizes in levels)


class UNet(eqx.Module):
    """A byte-level autoregressive U-Net whose token boundaries an estimator draws (SFE section 2.2).

    `model(bytes, key=key)` predicts; `model.loss(bytes, key=key)` is what to descend; `model.prefill` and `model.step` read a
    text byte by byte, for which `unet.generate` has the loop. Without a `head` of its own the model predicts with its
    `embedding`: one array, whose gradient is the sum of those of its two uses.
    """

    embedding: Float[Array, "vocab dim"]
    stage: AbstractStage
    norm: RMSNorm | None
    head: Linear | None
    early_norm: RMSNorm | None
    early_head: Linear | None
    compute: Literal["float32", "bfloat16"] = eqx.field(static=True)
    early_share: float = eqx.field(static=True)
    ngrams: HashedNgrams | None = None

    def __init__(
        self,
        config: AbstractShape,
        estimator: AbstractEstimator | Sequence[AbstractEstimator] | None,
        *,
        key: PRNGKeyArray,
    ):
        """`estimator`: one for each level of tokens, the outermost first; None for none at all, a purely byte-level model.

        The early head starts as a copy of the output head (SFE section 2.4) and exists only where an objective asks for it.
        Raises `ValueError` where the shape has another number of levels.
        """
        estimators = [estimator] if isinstance(estimator, AbstractEstimator) else list(estimator or ())
        parts = config.parts(estimators, key=key)
        self.embedding, self.stage, self.norm, self.head = parts.embedding, parts.stage, parts.norm, parts.head
        early = any(one.objective.needs_early_exit for one in estimators)
        self.early_norm = RMSNorm(self.embedding.shape[1]) if early else None
        self.early_head = jax.tree.map(lambda leaf: leaf, self.output_head) if early else None
        self.compute = config.compute
        self.early_share = config.early_share
        self.ngrams = parts.ngrams

    def __call__(
        self,
        bytes: Integer[Array, "batch length"],
        *,
        key: Keys | None = None,
        actions: Sequence[Bool[Array, "batch _"]] = (),
        segments: Int[Array, "batch length"] | None = None,
        mask: Bool[Array, "batch length"] | None = None,
        target_rate: Float[Array, ""] | None = None,
        capacities: Sequence[int] = (),
        samples: int = 1,
        training: bool = False,
    ) -> Prediction:
        """Predict the next byte at every row.

        `key` draws the boundaries (None: the likelier action of each byte; one for each sequence: see `Draw`), `actions`
        prescribes them level by level.
        `segments` numbers the documents of a row, `mask` is False on padding. `capacities` bound the tokens of each level;
        without them no boundary is ever dropped. `target_rate` takes the place of the rate the estimator was built for.
        `samples` draws boundaries so often for each sequence and returns that many neighbouring rows for it.
        """
        layout = plain_layout(bytes, segments, mask)
        drawing = Drawing(key, tuple(actions), target_rate, tuple(capacities), samples, training=training)
        return self.predict(self.stage(self.embed(layout), layout, drawing))

    def prefill(
        self,
        bytes: Integer[Array, "batch length"],
        *,
        mask: Bool[Array, "batch length"] | None = None,
        keys: Key[Array, " batch"] | None = None,
        capacities: Sequence[int] = (),
    ) -> Prefilled:
        """Predict at the first bytes of some texts, each as long as `mask` says (padding behind), as a call with these `keys` as
        its key would.

        The token caches have a slot for each token row: `unet.cache.with_room` makes more. Where a level overflows
        `capacities`, the state is of no use.
        """
        layout = plain_layout(bytes, None, mask)
        drawing = Drawing(keys, capacities=tuple(capacities))
        done = self.stage.prefill(self.embed(layout), layout, drawing)
        count = jnp.sum(layout.mask, axis=1, dtype=jnp.int32)
        recent = None
        if self.ngrams is not None:
            place = count[:, None] - self.ngrams.reach + jnp.arange(self.ngrams.reach, dtype=jnp.int32)
            recent = jnp.take_along_axis(layout.bytes, jnp.maximum(place, 0), axis=1, mode="clip")
        return Prefilled(self.predict(done.output), TextState(done.memory, count, keys, recent))

    def step(
        self,
        bytes: Int[Array, " batch"],
        state: TextState,
        advance: Bool[Array, " batch"],
        *,
        noise: Float[Array, " batch"] | None = None,
    ) -> NextByte:
        """Read one more byte of the texts that advance.

        `noise`, where given, is what `TextState.noise` says for this byte: made for many bytes at once it costs less.
        Raises nothing: where a token cache has no slot left, the logits of its text are not numbers.
        """
        count = state.count[:, None]
        layout = Layout(bytes[:, None], count, jnp.zeros_like(count), advance[:, None], state.count)
        drawing = Drawing(state.keys, noise=None if noise is None else noise[:, None])
        done = self.stage.step(self.embed(layout, state.recent), layout, drawing, state.stage)
        return NextByte(self.logits(done.hidden)[:, 0], done.closed, TextChange(done.change, layout.bytes))

    def predict(self, output: StageOutput, *, early_rows: Int[Array, " rows"] | None = None) -> Prediction:
        """The two heads on top of what the stage returned, the early one at `early_rows` only where they are given."""
        early_logits = None
        with jax.named_scope("heads"):
            if self.early_head is not None and self.early_norm is not None:
                hidden = output.levels[0].hidden
                hidden = hidden if early_rows is None else hidden[:, early_rows]
                early_logits = self.early_head.wide(self.early_norm(hidden))
            return Prediction(self.logits(output.hidden), early_logits, output.levels, early_rows)

    @property
    def output_head(self) -> Linear:
        """The head that predicts the next byte: the model's own, or its embedding turned round."""
        return Linear.of(self.embedding.T) if self.head is None else self.head

    def logits(self, hidden: Float[Array, "batch length dim"]) -> Float[Array, "batch length vocab"]:
        """The output head on top of what the stage returned."""
        return self.output_head.wide(hidden if self.norm is None else self.norm(hidden))

    def some_rows(self, length: int, key: PRNGKeyArray | None) -> Int[Array, " rows"] | None:
        """The rows of `length` at which the early head predicts in a training step; None for all, which it is without a key."""
        count = round(self.early_share * length)
        if self.early_head is None or key is None or count >= length:
            return None
        return jax.random.permutation(jax.random.fold_in(key, 2), length)[: max(count, 1)]

    def embed(
        self, layout: Layout, before: Int[Array, "batch reach"] | None = None
    ) -> Float[Array, "batch length dim"]:
        """One vector a byte, in the compute dtype; `before`: the bytes before these that embeddings of n-grams look at."""
        with jax.named_scope("embed"):
            embedded = self.embedding[layout.bytes]
            if self.ngrams is not None:
                embedded = embedded + self.ngrams(layout.bytes, layout.numbers, before)
            return embedded.astype(self.compute)

    def loss(
        self,
        bytes: Integer[Array, "batch length"],
        *,
        key: PRNGKeyArray | None,
        segments: Int[Array, "batch length"] | None = None,
        mask: Bool[Array, "batch length"] | None = None,
        target_rate: Float[Array, ""] | None = None,
        capacities: Sequence[int | Sequence[int]] = (),
        samples: int = 1,
        groups: int = 0,
        training: bool = True,
    ) -> LossOutput:
        """The language-model loss plus the losses of the objectives of all levels (SFE eq. 22).

        Where the outermost of `capacities` is not one bound but several in ascending order, the token level runs in as many
        rows as the smallest of them that has room for every sequence of the batch; only the largest drops boundaries. The
        program holds all of them, so one compilation serves every rate. With several, the loss can be differentiated once.

        `groups`, where it is not 0, cuts the batch into so many groups of neighbouring sequences and lays the token rows of each
        group one after another: then their sum decides which size has room. A group has that many rows for each of its
        sequences, which share them freely, but for none has more tokens than the largest size. Attention alone still works in
        as many rows for each sequence as that. Raises `ValueError` where `groups` does not divide the batch, and for groups of
        a model with levels inside levels.
        """
        if groups and len(self.stage.estimators) > 1:
            raise ValueError("token rows can be laid one after another where there is one level of tokens")
        sizes, bounds = _sizes(capacities)
        layout = plain_layout(bytes, segments, mask)
        drawing = Drawing(key, (), target_rate, bounds, samples, groups, training)
        begun = self.stage.begin(self.embed(layout), layout, drawing)

        def finish(capacity: int | None):
            def way(operands: tuple[UNet, Begun, Drawing, Layout]) -> tuple[Float[Array, ""], LossOutput]:
                model, begun, drawing, layout = operands
                early_rows = model.some_rows(layout.bytes.shape[1], drawing.key) if drawing.training else None
                output = model.stage.finish(begun, drawing, capacity=capacity)
                prediction = model.predict(output, early_rows=early_rows)
                with jax.named_scope("loss"):
                    found = model.losses(
                        prediction,
                        repeated(layout, samples),
                        target_rate=drawing.target_rate,
                        samples=samples,
                        capacity=capacity,
                    )
                return found.loss, found

            return way

        which = smallest_with_room(begun.fullest(groups), sizes)
        # What only the beginning needs would get a gradient of zeros from every way to end.
        ending = eqx.tree_at(
            lambda model: (model.embedding, model.ngrams, model.stage),
            self,
            (self.embedding if self.head is None else None, None, self.stage.ending()),
            is_leaf=lambda part: part is None,
        )
        ways = [finish(size) for size in sizes or (None,)]
        loss, output = chosen(which, ways, (ending, begun, drawing, layout))
        # The loss inside `output` stands beside what is differentiated and carries no gradient.
        return dataclasses.replace(output, loss=loss)

    def losses(
        self,
        prediction: Prediction,
        layout: Layout,
        *,
        target_rate: Float[Array, ""] | None = None,
        samples: int = 1,
        capacity: int | None = None,
    ) -> LossOutput:
        """The losses of a prediction that has been made; `layout` has a row for each of its rows, and the token level had
        `capacity` rows for each sequence (None: as many as there are bytes)."""
        objectives = [estimator.objective for estimator in self.stage.estimators]
        return losses(prediction, objectives, layout, target_rate=target_rate, samples=samples, capacity=capacity)
