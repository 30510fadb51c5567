"""Boundaries where the tokens of a byte-pair encoding begin, found causally: without reading later bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from estimators.base import (
    AbstractRouter,
    Layout,
    Routed,
    SamplingOptions,
)
from estimators.bounds import VocabularySize, require_within
from estimators.routers.rules import certain
from estimators.sharding import varying_zeros

if TYPE_CHECKING:
    from tokenizers import Tokenizer

WORDS = r" ?[A-Za-z\x80-\xff]+| ?[0-9]+| ?[^\sA-Za-z0-9\x80-\xff]+|\s+"
"""Pre-tokenization: tokens stay within a word, a number or a run of symbols, each with at most one space before it, or a run of
white space such as an indentation. For bytes decoded as Latin-1; every byte from 128 up counts as a letter."""


def train_vocabulary(texts: Iterable[bytes], size: int) -> list[bytes]:
    """The tokens of a byte-pair encoding learned from `texts`: the single bytes, then the merges in order.

    `texts` are read once and not kept: memory grows with the number of distinct words (see `WORDS`), not with length. Raises
    `ImportError` without the extra `bpe` (the `tokenizers` library) and `ValueError` for a `size` below 257 (256
    bytes and one merge) or above 2^24.
    """
    ranked = sorted(train_tokenizer(texts, size).get_vocab().items(), key=lambda item: item[1])
    return [token.encode("latin-1") for token, _ in ranked]


def train_tokenizer(texts: Iterable[bytes], size: int) -> Tokenizer:
    """The tokenizer of that encoding, which reads bytes as the characters of Latin-1."""
    require_within("the size of a vocabulary", size, VocabularySize)
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ImportError("a byte-pair encoding needs the tokenizers library: pip install 'caesura-lm[bpe]'") from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    alphabet = [chr(value) for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((text.decode("latin-1") for text in texts), trainer)
    return tokenizer


class Read(eqx.Module):
    """Where tokens begin at some positions, and the `node` of the prefix tree that each sequence has reached after them."""

    begins: Bool[Array, "batch length"]
    node: Int[Array, " batch"]


class PrefixTree(eqx.Module):
    """All prefixes of a vocabulary's tokens (a trie), as sorted arrays.

    Node 0 is the empty string. The child of node n by byte b is node k + 1, where k is the index of 256 n + b in the sorted
    `edges`; `rank[k]` is the index in the vocabulary of the first token that begins with the prefix of node k + 1.
    """

    edges: Int[Array, " nodes"]
    rank: Int[Array, " nodes"]

    def __init__(self, vocabulary: Sequence[bytes]):
        """Raises `ValueError` for a vocabulary that lacks one of the 256 single bytes."""
        if missing := {bytes([value]) for value in range(256)} - set(vocabulary):
            raise ValueError(f"a vocabulary needs all 256 single bytes as tokens; {len(missing)} are missing")
        first: dict[bytes, int] = {}
        for place, token in enumerate(vocabulary):
            for end in range(1, len(token) + 1):
                first.setdefault(token[:end], place)
        # By length, then parent, then byte: parents are numbered before their children, and the edges come out sorted.
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
        """True where a token begins: no token starts with the current token's bytes so far followed by this byte.

        Greedy from left to right, and causal. `size` limits the vocabulary to its first `size` tokens.
        """
        return self.read(layout, size=size).begins

    def read(
        self, layout: Layout, node: Int[Array, " batch"] | None = None, *, size: int | Int[Array, ""] | None = None
    ) -> Read:
        """The same, with the node reached at the end. `node` is the one reached by earlier positions, None at the start."""

        def step(node, row):
            byte, start, there = row
            wanted = jnp.where(start, 0, node) * 256 + byte
            place = jnp.minimum(jnp.searchsorted(self.edges, wanted), self.edges.shape[0] - 1)
            goes_on = (self.edges[place] == wanted) & ~start
            if size is not None:
                goes_on &= self.rank[place] < size
            # The first 256 edges are those of the root, in the order of the bytes.
            return jnp.where(there, jnp.where(goes_on, place + 1, byte + 1), node), ~goes_on

        node = varying_zeros(layout.bytes, layout.bytes.shape[:1], jnp.int32) if node is None else node
        node, begins = jax.lax.scan(step, node, (layout.bytes.T, layout.starts.T, layout.mask.T))
        return Read(begins.T, node)


@dataclass(frozen=True)
class Sized:
    """How many tokens of a vocabulary to use, and their `rate`: the fraction of bytes at which a token begins."""

    size: int
    rate: float


def find_size(tree: PrefixTree, layout: Layout, rate: float) -> Sized:
    """The vocabulary size whose rate on `layout` is nearest to `rate`, and the rate it has.

    Found by bisection, since the rate falls as the vocabulary grows. The whole vocabulary if even its rate is higher.
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
    """A boundary at the first byte of each token, with a vocabulary matched greedily from left to right.

    The score-function authors tokenize the whole text and shift the boundaries by one byte. Those boundaries still depend on
    later bytes, since merges do; prefix matching is causal.

    The rate follows from the vocabulary and the text; no target rate changes it. `measured_rate` is the rate that `find_size`
    measured, or None.
    """

    tree: PrefixTree
    measured_rate: float | None = eqx.field(static=True, default=None)

    @property
    def rate(self) -> float | None:
        return self.measured_rate

    def init_state(self, batch: int) -> Int[Array, " batch"]:
        """The node of the tree reached by the text so far."""
        return jnp.zeros((batch,), jnp.int32)

    def route(
        self,
        hidden: Float[Array, "batch length dim"],
        layout: Layout,
        options: SamplingOptions,
        state: Int[Array, " batch"] | None = None,
    ) -> Routed:
        read = self.tree.read(layout, state)
        boundaries = certain(read.begins if options.actions is None else options.actions, layout)
        return Routed(boundaries, None if state is None else read.node)
