"""Distillation of a model of tokens into a hierarchy over bytes (H-Net appendix F).

The layers of the model of tokens become the main network. While the hierarchy is aligned, its boundaries are those of the
tokenizer, its router learns them, its encoder learns to make the embeddings that the layers were trained with, and its decoder
what the model of tokens expects of the next byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

from estimators.base import EOS, VOCAB, AbstractObjective
from estimators.equations import byte_matching_loss, embedding_matching_loss
from unet.blocks import computed
from unet.fused_attention import AttentionForm
from unet.hierarchy import AbstractStage, Hierarchy
from unet.likelihood import plain_layout
from unet.losses import LossOutput, losses
from unet.model import UNet
from unet.ngrams import rolling_hash
from unet.tokens.batch import TokenBatch
from unet.tokens.model import TokenModel
from unet.tokens.spelling import ExpectedBytes, NextBytes
from unet.tokens.tokenizer import Tokenizer
from unet.wrapped import Adapted

Places = Literal["starts", "ends"]
"""Where a boundary closes a token of the tokenizer: at the first byte of the next token, or at its own last byte."""


class Teacher(eqx.Module):
    """A model of tokens, from which a hierarchy learns."""

    model: TokenModel

    @classmethod
    def of(cls, model: TokenModel) -> Teacher:
        """Raises `ValueError` for a model that has levels of its own inside the tokenizer."""
        levels = len(model.inner.stage.estimators)
        if levels:
            raise ValueError(f"the model of tokens has {levels} levels of its own: its layers must be one network")
        return cls(model)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer

    @property
    def embedding(self) -> Float[Array, "vocab dim"]:
        return self.model.inner.embedding

    @property
    def stage(self) -> AbstractStage:
        """Its layers."""
        return self.model.inner.stage

    @property
    def dim(self) -> int:
        """The width of its hidden states."""
        return self.embedding.shape[1]


def distilled(
    student: UNet, teacher: Teacher, hidden: int, *, remat: bool, attention: AttentionForm, key: PRNGKeyArray
) -> UNet:
    """`student` with the teacher's layers in place of its main network, between two adapters of inner width `hidden`.

    Rotary positions of tokens are their indices, as in the teacher. The first adapter starts with outputs of the size of the
    teacher's embeddings; for those of bytes see `with_token_embeddings`. `remat` and `attention` are settings of the layers.
    Raises `ValueError` for a student without exactly one token level, or whose tokens are not as wide as its bytes.
    """
    stage = student.stage
    if not isinstance(stage, Hierarchy) or stage.inner.estimators:
        raise ValueError("a model of tokens is distilled into a model of bytes with one token level")
    dim = student.embedding.shape[1]
    if stage.estimator.chunker.token_dim(dim) != dim or stage.decoder.unfold is not None:
        raise ValueError("tokens must be as wide as bytes, and come back to them without attention")
    layers = computed(teacher.stage, remat=remat, attention=attention, implementation=stage.implementation)
    main = Adapted(dim, layers, teacher.dim, hidden, key=key)
    size = jnp.sqrt(jnp.mean(jnp.square(teacher.embedding.astype(jnp.float32))))
    main = eqx.tree_at(lambda one: one.enter.direct.weight, main, replace_fn=lambda weight: weight * size)
    student = with_token_embeddings(student, teacher)
    inside = Hierarchy(
        stage.encoder,
        stage.estimator,
        main,
        stage.decoder,
        chunk_positions=True,
        implementation=stage.implementation,
    )
    return eqx.tree_at(lambda model: model.stage, student, inside)


def with_token_embeddings(student: UNet, teacher: Teacher) -> UNet:
    r"""`student` with byte and n-gram embeddings that add up, at every byte, to the embedding of the longest token that ends
    there, up to rows that n-grams share (Minixhofer et al., "Bolmo: byteifying the next generation of language models").

    A token t whose longest proper suffix among the tokens is s has the row $e_t - e_s$ in the table of its length, and n-grams
    that are no tokens have zero: along the tokens that end at a byte, each a suffix of the next, the sum is that of the longest.
    Only lengths that the student has a table for count. The tables are hashed: where several n-grams have one row, it is the sum
    of theirs, and each of them is off by the others. Unchanged for a student without n-gram embeddings, or of another width
    than the teacher.
    """
    ngrams, dim = student.ngrams, student.embedding.shape[1]
    if ngrams is None or dim != teacher.dim:
        return student
    wanted = np.asarray(teacher.embedding, np.float32)
    number: dict[bytes, int] = {}
    for place, token in enumerate(teacher.tokenizer.tokens):
        if len(token) == 1 or len(token) in ngrams.sizes:
            number.setdefault(token, place)
    tables = []
    for size, table in zip(ngrams.sizes, ngrams.tables, strict=False):
        own = [token for token in number if len(token) == size]
        rows = np.zeros(table.shape, np.float32)
        if own:
            ids = ngrams.ids(jnp.asarray(np.frombuffer(b"".join(own), np.uint8).reshape(-1, size), jnp.int32))
            places = np.asarray(rolling_hash(ids, table.shape[0], ngrams.primes[0]))
            suffixes = [next(number[one[cut:]] for cut in range(1, size) if one[cut:] in number) for one in own]
            np.add.at(rows, places, wanted[[number[one] for one in own]] - wanted[suffixes])
        tables.append(jnp.asarray(rows))
    # Those of further hash functions.
    tables += [jnp.zeros_like(table) for table in ngrams.tables[len(ngrams.sizes) :]]
    # One token may stand for both marks of a document.
    singles = [number.get(bytes([value]), number[bytes([EOS])]) for value in range(VOCAB)]
    new = jnp.asarray(wanted[singles]), tuple(tables)
    return eqx.tree_at(lambda model: (model.embedding, model.ngrams.tables), student, new)


class TokenTargets(eqx.Module):
    """Where the tokens of a tokenizer close in rows of bytes (`actions`), and the number of the token that closes there
    (`tokens`; 0 elsewhere)."""

    actions: Bool[Array | np.ndarray, "batch length"]
    tokens: Int[Array | np.ndarray, "batch length"]


def token_targets(
    tokens: TokenBatch, batch: Mapping[str, Shaped[np.ndarray, "batch length"]], places: Places
) -> TokenTargets:
    """Where the `tokens` of each document close, and which, in rows of `bytes` with their `segments` and `mask`.

    The first byte of a document is a token by itself, as in training on tokens, and closes at once. Of the others each closes at
    its last byte (`ends`), or at the first byte of the next token (`starts`: H-Net), where its end can be known from the bytes so
    far. Either way the main network sees the same tokens one after another. The last token of a full row is left out: its
    document may go on, and the token with it.
    """
    segments, mask = np.asarray(batch["segments"]), np.asarray(batch["mask"])
    ends, of = np.asarray(tokens.ends), np.asarray(tokens.segments)
    first = np.ones(ends.shape, bool)
    first[:, 1:] = of[:, 1:] != of[:, :-1]
    sites = ends + (places == "starts") * ~first
    width = mask.shape[1]
    inside = np.minimum(sites, width - 1)
    rows = np.arange(len(ends))[:, None]
    valid = np.asarray(tokens.mask) & (sites < width) & mask[rows, inside] & (segments[rows, inside] == of)
    valid &= (sites < width - 1) | first | (places == "starts")
    made = TokenTargets(np.zeros(mask.shape, bool), np.zeros(mask.shape, np.int32))
    where = np.broadcast_to(rows, sites.shape)[valid], sites[valid]
    made.actions[where], made.tokens[where] = True, np.asarray(tokens.ids)[valid]
    return made


class Alignment(eqx.Module):
    r"""The loss of a hierarchy whose main network is a teacher's: that of the language model and
    $\lambda_b\,\mathrm{mean}_i\,\mathrm{CE}(p_i, b_i) + \lambda_e\,L_{emb}$ (H-Net appendix F)
    $+\,\lambda_q\,\mathrm{mean}_i\,\mathrm{KL}(q_i \,\|\, p(x_{i+1} \mid x_{\le i}))$.

    b are the teacher's boundaries, which are also those that the tokens are made with, $\mathrm{CE}$ the binary cross-entropy of
    the router, which is the `objective` (`Imitation` with the weight $\lambda_b$), and $L_{emb}$
    `equations.embedding_matching_loss` of what enters the layers. q is what the teacher expects of the next byte
    (`equations.byte_matching_loss`); where nothing is `expected` that part is left out. The estimator's own objective has no
    part; an early-exit head learns as it does in the score function (SFE eq. 22).
    """

    embedding: Float[Array, "vocab dim"]
    objective: AbstractObjective
    expected: ExpectedBytes | None = None
    embedding_weight: float = eqx.field(static=True, default=1.0)
    byte_weight: float = eqx.field(static=True, default=1.0)
    early_weight: float = eqx.field(static=True, default=0.1)

    def __call__(self, model: UNet, batch: Mapping[str, PyTree[Array]], *, capacity: int | None = None) -> LossOutput:
        """The loss of `model`, made by `distilled`, on the rows of `batch`, with their `targets` and, where there is something
        `expected`, their `tokens` and `next_bytes`. `capacity`: most tokens of a row; boundaries beyond it are dropped and
        counted."""
        targets: TokenTargets = batch["targets"]
        layout = plain_layout(batch["bytes"], batch["segments"], batch["mask"])
        capacities: Sequence[int] = () if capacity is None else (capacity,)
        prediction = model(
            batch["bytes"],
            actions=(jnp.asarray(targets.actions),),
            segments=batch["segments"],
            mask=batch["mask"],
            capacities=capacities,
            training=True,
        )
        output = losses(prediction, [self.objective], layout, capacity=capacity)
        stage, level = model.stage, prediction.levels[0]
        assert isinstance(stage, Hierarchy)
        assert isinstance(stage.inner, Adapted)
        count = level.hidden.shape[1] if capacity is None else min(capacity, level.hidden.shape[1])
        tokens = stage.estimator.chunker.down(level.hidden, level.boundaries, capacity=count).tokens
        closed = jnp.take_along_axis(jnp.asarray(targets.tokens), tokens.positions, axis=1, mode="clip")
        match = embedding_matching_loss(stage.inner.enter(tokens.values), self.embedding[closed], tokens.mask)
        loss = output.loss + self.embedding_weight * match
        if output.early_log_prob is not None:
            loss = loss - self.early_weight * output.early_log_prob
        metrics = {**output.metrics, "embedding_loss": match}
        if self.expected is not None:
            where: NextBytes = batch["next_bytes"]
            wanted, known = self.expected(batch["tokens"], where)
            # A teacher may have no positions for more tokens.
            known &= jnp.asarray(where.after) < count
            metrics["byte_loss"] = byte_matching_loss(
                wanted, jax.nn.log_softmax(prediction.logits.astype(jnp.float32)), known
            )
            loss = loss + self.byte_weight * metrics["byte_loss"]
        return LossOutput(
            loss, output.log_prob, output.early_log_prob, output.rate, output.overflow, output.padding, metrics
        )


def main_network(model: UNet) -> PyTree[Array]:
    """The teacher's layers inside a hierarchy that `distilled` made."""
    assert isinstance(model.stage, Hierarchy)
    assert isinstance(model.stage.inner, Adapted)
    return model.stage.inner.stage
