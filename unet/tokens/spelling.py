"""What a model of tokens says of the next byte: its tokens, by the bytes that they begin with."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from unet.tokens.batch import TokenBatch
from unet.tokens.model import TokenModel

LEAST_MASS = 1e-3
"""Where tokens that begin as the text does have less probability than this, a model says nothing of the next byte: the sums that
it is read from are exact to about a millionth."""


AT_A_TIME = 2**26
"""Probabilities of tokens that are computed at a time: a quarter of a gigabyte, several times."""


class NextBytes(eqx.Module):
    """Where the bytes of a row are predicted inside its tokens. After each byte: the place in the row of the last token that is
    complete (`after`), the number of the bytes of the next token so far (`prefix`), and where there is a next one (`mask`)."""

    after: Int[Array | np.ndarray, "batch length"]
    prefix: Int[Array | np.ndarray, "batch length"]
    mask: Bool[Array | np.ndarray, "batch length"]


class ExpectedBytes(eqx.Module):
    """What a model of tokens expects of the next byte. `spelling`: that of its `Tokenizer.written` tokens."""

    model: TokenModel
    spelling: Spelling

    def __call__(
        self, tokens: TokenBatch, where: NextBytes
    ) -> tuple[Float[Array, "batch length 256"], Bool[Array, "batch length"]]:
        """`Spelling.probabilities` of its predictions after `tokens`, for as many sequences at a time as `AT_A_TIME` allows."""
        tokens, where = jax.tree.map(jnp.asarray, (tokens, where))

        def of(
            tokens: TokenBatch, where: NextBytes
        ) -> tuple[Float[Array, "rows length 256"], Bool[Array, "rows length"]]:
            ids, segments, mask = (jnp.asarray(leaf) for leaf in (tokens.ids, tokens.segments, tokens.mask))
            found = self.model.inner(ids, segments=segments, mask=mask)
            return self.spelling.probabilities(found.logits, where)

        rows, count = tokens.ids.shape
        together = max(1, AT_A_TIME // (count * self.model.tokenizer.size))
        if together >= rows:
            return of(tokens, where)

        def of_one(row: tuple[TokenBatch, NextBytes]) -> tuple[Float[Array, "length 256"], Bool[Array, " length"]]:
            return jax.tree.map(lambda leaf: leaf[0], of(*jax.tree.map(lambda leaf: leaf[None], row)))

        return jax.lax.map(of_one, (tokens, where), batch_size=together)


class Spelling(eqx.Module):
    """The tokens of a vocabulary by what they begin with: the prefixes are all proper beginnings of tokens, the empty one first.

    `order`: the numbers of the tokens in the order of their bytes. `starts`: for each prefix and byte b, the place in that order
    of the first token that goes on after the prefix with b or a later byte; at 256 the end of all that go on. `paths`: for every
    byte of every token, the number of the prefix before it; `sizes`: the bytes of each token.

    `starts` has a kilobyte for each prefix: 2 MB for a vocabulary of 2,048 tokens, a few hundred for one of 128,000.
    """

    order: Int[np.ndarray, " vocab"]
    starts: Int[np.ndarray, "prefixes 257"]
    paths: Int[np.ndarray, " bytes"]
    sizes: Int[np.ndarray, " vocab"]

    @classmethod
    def of(cls, tokens: Sequence[bytes]) -> Spelling:
        """That of the tokens with these bytes. Tokens without bytes begin nothing."""
        order = sorted(range(len(tokens)), key=tokens.__getitem__)
        ordered = [tokens[number] for number in order]
        prefixes: dict[bytes, int] = {b"": 0}
        for token in ordered:
            for size in range(1, len(token)):
                prefixes.setdefault(token[:size], len(prefixes))
        paths = np.array([prefixes[token[:size]] for token in tokens for size in range(len(token))], np.int32)
        following = np.zeros((len(prefixes), 257), np.int32)
        np.add.at(following, (paths, 1 + np.frombuffer(b"".join(tokens), np.uint8).astype(np.int64)), 1)
        # After the tokens that are the prefix itself.
        first = np.array([bisect.bisect_right(ordered, prefix) for prefix in prefixes], np.int32)
        starts = first[:, None] + np.cumsum(following, axis=1, dtype=np.int32)
        return cls(np.array(order, np.int32), starts, paths, np.array([*map(len, tokens)], np.int32))

    def next_bytes(self, tokens: TokenBatch, length: int) -> NextBytes:
        """Where the bytes of rows of this `length` are predicted inside their tokens. Runs on the host.

        The bytes of the last token of a full row are left out, since the token may go on, and so is the first of a document.
        """
        ids, ends, segments, mask = (
            np.asarray(leaf) for leaf in (tokens.ids, tokens.ends, tokens.segments, tokens.mask)
        )
        made = NextBytes(*(np.zeros((len(ids), length), kind) for kind in (np.int32, np.int32, np.bool_)))
        follows = mask[:, 1:] & mask[:, :-1] & (segments[:, 1:] == segments[:, :-1]) & (ends[:, 1:] < length - 1)
        rows, after = np.nonzero(follows)
        next_ids = ids[rows, after + 1]
        sizes = self.sizes[next_ids]
        inside = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        where = np.repeat(rows, sizes), np.repeat(ends[rows, after], sizes) + inside
        made.after[where], made.mask[where] = np.repeat(after, sizes), True
        made.prefix[where] = self.paths[np.repeat((np.cumsum(self.sizes) - self.sizes)[next_ids], sizes) + inside]
        return made

    def probabilities(
        self, logits: Float[Array, "batch tokens vocab"], where: NextBytes
    ) -> tuple[Float[Array, "batch length 256"], Bool[Array, "batch length"]]:
        r"""The next byte as a model of tokens expects it, and where it says anything:

        $q_i(b) = \sum_{t \,:\, s_i b \,\preceq\, t} p_m(t) \,/\, \sum_{t \,:\, s_i \prec t} p_m(t)$, with m the last token that
        is complete after byte i, $p_m$ the softmax of its `logits`, $s_i$ the bytes since then, and $\preceq$ for "begins".

        Float32. It is given whether a token ends at byte i, which a model of bytes learns later: the mean over texts is what is
        expected of the next byte, and no model of bytes can be equal to it everywhere.
        """
        ordered = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)[..., jnp.asarray(self.order)]
        sums = jnp.cumsum(ordered, axis=-1)
        after, places = jnp.asarray(where.after), jnp.asarray(self.starts)[jnp.asarray(where.prefix)]
        rows = jnp.arange(sums.shape[0])[:, None, None]
        # The sum of all tokens before the place.
        before = jnp.where(places > 0, sums[rows, after[..., None], jnp.maximum(places - 1, 0)], 0.0)
        masses = jnp.maximum(jnp.diff(before, axis=-1), 0.0)
        mass = jnp.sum(masses, axis=-1)
        known = jnp.asarray(where.mask) & (mass >= LEAST_MASS)
        return jnp.where(known[..., None], masses / jnp.where(known, mass, 1.0)[..., None], 0.0), known
