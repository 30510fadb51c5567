"""Boundaries where the tokens of a byte-pair encoding begin, as far as a reader can know without looking ahead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from estimators.base import (
    AbstractChunker,
    AbstractEstimator,
    AbstractObjective,
    AbstractRouter,
    Boundaries,
    Draw,
    Layout,
    Routed,
)
from estimators.fixed import certain
from estimators.objectives import Imitation, NoObjective
from estimators.routers import Guided

WORDS = r" ?[A-Za-z\x80-\xff]+| ?[0-9]+| ?[^\sA-Za-z0-9\x80-\xff]+|\s+"
"""What no token crosses: a word, a number or a run of signs, each with the one space before it, or a run of other white
space, such as an indentation. Written for bytes read as Latin-1, so that every byte from 128 up counts as part of a letter."""


def train_vocabulary(texts: Iterable[bytes], size: int) -> list[bytes]:
    """The tokens of a byte-pair encoding learned from `texts`, single bytes first, then in the order they were merged.

    `texts` are read once and not kept: memory follows the different words in them (see `WORDS`), not their length. Needs the
    extra `bpe` (the `tokenizers` library). Raises `ImportError`, saying so, without it, and `ValueError` for a
    `size` below 257.
    """
    if size < 257:
        raise ValueError(f"a vocabulary has 256 bytes and at least one merge; got a size of {size}")
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ImportError("a byte-pair encoding needs the tokenizers library: pip install 'caesura-lm[bpe]'") from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    alphabet = [chr(value) for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((text.decode("latin-1") for text in texts), trainer)
    ranked = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [token.encode("latin-1") for token, _ in ranked]


class Read(eqx.Module):
    """Where tokens begin in some rows, and the `node` of the prefix tree that each sequence is at after them."""

    begins: Bool[Array, "batch length"]
    node: Int[Array, " batch"]


class PrefixTree(eqx.Module):
    """All beginnings of a vocabulary's tokens, as a table that arrays can walk.

    Node 0 is the empty string. The child of node n by byte b is node k + 1, where k is the place of 256 n + b in `edges`,
    which are sorted. `rank` of a node is the place in the vocabulary of the first token that begins with it.
    """

    edges: Int[Array, " nodes"]
    rank: Int[Array, " nodes"]

    def __init__(self, vocabulary: Sequence[bytes]):
        """Raises `ValueError` for a vocabulary that lacks one of the 256 single bytes."""
        if missing := {bytes([value]) for value in range(256)} - set(vocabulary):
            raise ValueError(f"a vocabulary of bytes needs all 256 single bytes; {len(missing)} are missing")
        first: dict[bytes, int] = {}
        for place, token in enumerate(vocabulary):
            for end in range(1, len(token) + 1):
                first.setdefault(token[:end], place)
        # By length, then by parent, then by byte: parents come before children, so that numbers can be given in one pass.
        number = {b"": 0}
        edges, rank = [], []
        level = [b""]
        children: dict[bytes, list[bytes]] = {}
        for prefix in first:
            children.setdefault(prefix[:-1], []).append(prefix)
        while level:
            below = []
            for parent in level:
                for prefix in sorted(children.get(parent, [])):
                    number[prefix] = len(edges) + 1
                    edges.append(256 * number[parent] + prefix[-1])
                    rank.append(first[prefix])
                    below.append(prefix)
            level = below
        self.edges = jnp.asarray(np.array(edges, np.int32))
        self.rank = jnp.asarray(np.array(rank, np.int32))

    def begins(self, layout: Layout, size: int | Int[Array, ""] | None = None) -> Bool[Array, "batch length"]:
        """True where the byte cannot belong to the token so far: no token begins with what has been read of it and the byte.

        Greedy from left to right and causal. `size` reads the first so many tokens of the vocabulary only.
        """
        return self.read(layout, size=size).begins

    def read(
        self, layout: Layout, node: Int[Array, " batch"] | None = None, *, size: int | Int[Array, ""] | None = None
    ) -> Read:
        """The same with where it ends, from where earlier rows ended (`node`, None where there are none)."""

        def step(node, row):
            byte, start, there = row
            wanted = jnp.where(start, 0, node) * 256 + byte
            place = jnp.minimum(jnp.searchsorted(self.edges, wanted), self.edges.shape[0] - 1)
            goes_on = (self.edges[place] == wanted) & ~start
            if size is not None:
                goes_on &= self.rank[place] < size
            # The first 256 edges are those of the root, in the order of the bytes.
            return jnp.where(there, jnp.where(goes_on, place + 1, byte + 1), node), ~goes_on

        node = jnp.zeros(layout.bytes.shape[0], jnp.int32) if node is None else node
        node, begins = jax.lax.scan(step, node, (layout.bytes.T, layout.starts.T, layout.mask.T))
        return Read(begins.T, node)


@dataclass(frozen=True)
class Sized:
    """How many tokens of a vocabulary to read, and the `rate` at which they begin: a share of bytes."""

    size: int
    rate: float


def find_size(tree: PrefixTree, layout: Layout, rate: float) -> Sized:
    """The size at which tokens begin nearest to `rate` of the bytes of `layout`, and the rate that they do begin at.

    By bisection, since the rate falls as the vocabulary grows, to the two sizes next to each other between which it passes the
    one asked for; of these the nearer. The whole vocabulary where even that begins tokens more often.
    """

    @jax.jit
    def rate_at(tree: PrefixTree, layout: Layout, size: Int[Array, ""]) -> Float[Array, ""]:
        return jnp.sum(tree.begins(layout, size) & layout.mask) / jnp.sum(layout.mask)

    def sized(size: int) -> Sized:
        return Sized(size, float(rate_at(tree, layout, jnp.asarray(size, jnp.int32))))

    low, high = sized(256), sized(int(jnp.max(tree.rank)) + 1)
    if high.rate > rate:
        return high
    while high.size - low.size > 1:
        middle = sized((low.size + high.size) // 2)
        low, high = (low, middle) if middle.rate <= rate else (middle, high)
    return min(low, high, key=lambda one: abs(one.rate - rate))


class PrefixRouter(AbstractRouter):
    """A boundary at the first byte of each token of a vocabulary that is read greedily, from left to right.

    The score-function authors take the tokens of the whole text and shift their boundaries by one byte; which tokens those
    are still depends on bytes to come, since merges do. Reading prefixes never looks ahead.

    Its rate is a property of the vocabulary and of the text: `measured_rate` is what `find_size` measured, None where nobody did.
    Nothing moves it, no target rate either.
    """

    tree: PrefixTree
    measured_rate: float | None = eqx.field(static=True, default=None)

    @property
    def rate(self) -> float | None:
        return self.measured_rate

    def __call__(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Boundaries:
        return certain(self.tree.begins(layout) if draw.actions is None else draw.actions, layout)

    def prefill(self, hidden: Float[Array, "batch length dim"], layout: Layout, draw: Draw) -> Routed:
        """The memory is the node of the tree that the text so far has come to."""
        read = self.tree.read(layout)
        return Routed(certain(read.begins if draw.actions is None else draw.actions, layout), read.node)

    def step(
        self, hidden: Float[Array, "batch 1 dim"], layout: Layout, draw: Draw, memory: Int[Array, " batch"]
    ) -> Routed:
        read = self.tree.read(layout, memory)
        return Routed(certain(read.begins if draw.actions is None else draw.actions, layout), read.node)


class BPEGuided(AbstractEstimator):
    """Boundaries guided by a byte-pair encoding: the strongest prescribed boundaries in the score-function paper."""

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(self, vocabulary: Sequence[bytes], *, chunker: AbstractChunker, rate: float | None = None):
        """`rate` is the share of bytes at which tokens of the vocabulary begin (`find_size`), where it is known."""
        self.router = PrefixRouter(PrefixTree(vocabulary), rate)
        self.chunker, self.objective = chunker, NoObjective()


class Distilled(AbstractEstimator):
    """A `student` policy that learns a `guide`'s boundaries by cross-entropy while the model trains on them.

    In evaluation and generation the student draws, so that the guide is no longer needed.
    """

    router: AbstractRouter
    chunker: AbstractChunker
    objective: AbstractObjective

    def __init__(
        self, student: AbstractRouter, guide: AbstractRouter, *, chunker: AbstractChunker, weight: float = 0.1
    ):
        """`weight` is that of the cross-entropy beside the language-model loss."""
        self.router, self.chunker, self.objective = Guided(student, guide), chunker, Imitation(weight)
