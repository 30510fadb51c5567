"""Causal attention, full or block-local, with soft-capped logits and a float32 softmax."""

from __future__ import annotations

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from estimators.base import Layout
from estimators.bounds import Width, require_within
from estimators.equations import soft_cap
from unet.cross import VisibleTokens
from unet.decoding.kv_cache import AnyCache, KVCache, KVUpdate, attend_cached
from unet.experts import ExpertLoss
from unet.fused_attention import AttentionForm, attend_fused, refusal, unable
from unet.layers import Affine, Linear, Rotary, for_all_heads, require_heads
from unet.ops.mosaic import Implementation, dispatch
from unet.visibility import Located, blocks_of, spans_of, visible

BLOCK_QUERIES = 2048
"""Queries per block of full attention over longer texts. Memory then grows with the length, not with its square."""

MIN_STRIP_QUERIES = 128
"""Minimum number of queries per strip of full attention over shorter texts. There are at most four strips; each skips the keys
after it."""


BY_NAME: dict[AttentionForm, Implementation | None] = {"auto": None, "xla": "xla", "tokamax": "pallas"}
"""The forms of attention as implementations of an operation."""


class Visibility(eqx.Module):
    """Which keys each query sees, in the block form that `attend` uses, and the `form` that it takes.

    Positions are split into blocks of queries. With a window, a block is as long as the window and sees itself and the block
    before it. Full attention has a single block up to a length of `BLOCK_QUERIES`; over longer texts `mask` is None, and `attend`
    computes the mask of each block when it needs it.
    """

    segments: Int[Array, "batch length"]
    mask: Bool[Array, "batch blocks block span"] | None
    window: int | None = eqx.field(static=True)
    form: AttentionForm = eqx.field(static=True)

    def __init__(self, layout: Layout, window: int | None, form: AttentionForm = "auto"):
        """Causal, within a document, and never from or to padding, except that a padded position sees itself (a softmax needs
        one key).

        `window`: how many positions a query sees, itself included; None for all before it.
        """
        length, self.form = layout.mask.shape[1], form
        self.segments = jnp.where(layout.mask, layout.segments, -1)
        # A window over everything is full attention.
        self.window = None if window is not None and window >= length else window
        block = length if self.window is None else self.window
        # Over a longer text, `_attend_in_blocks` computes the mask of each block when it needs it.
        self.mask = self._blockwise(block) if self.window is not None or length <= BLOCK_QUERIES else None

    def _blockwise(self, block: int) -> Bool[Array, "batch blocks block span"]:
        length = self.segments.shape[1]
        positions = jnp.broadcast_to(jnp.arange(length), self.segments.shape)
        # The padding of the last block has a position after every query, so no query sees it.
        queries = Located(blocks_of(self.segments, block, fill=-1), blocks_of(positions, block, fill=length))
        before = 0 if self.window is None else block
        keys = Located(spans_of(self.segments, block, before, fill=-2), spans_of(positions, block, before, fill=length))
        return visible(queries, keys, self.window)


def attend(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads head_dim"],
    visibility: Visibility,
    *,
    cap: float | None,
) -> Float[Array, "batch length heads head_dim"]:
    r"""$\mathrm{softmax}\big(c\tanh(qk^\top/(c\sqrt{d}))\big)v$ over the visible keys (Gemma 2). Without a cap the logits are
    $qk^\top/\sqrt{d}$.

    With a window, time and memory are `length · window`. For full attention, time is `length²` and memory `length ·
    BLOCK_QUERIES`: over longer texts, the weights of each block of queries are recomputed in the backward pass. Logits and
    softmax are float32, the result has the dtype of `value`.

    On CUDA the fused kernels of tokamax do it where they can (`unet.fused_attention`); their products of logits and values are
    those of bfloat16, and their sums float32. Raises `ValueError` if they were requested by name and cannot.
    """
    form, refused = visibility.form, None
    if form == "auto" and unable() is not None:
        form = "xla"
    if form != "xla":
        refused = refusal(query.shape[1], query.shape[3], visibility.window, query.dtype)

    def xla(query: Array, key: Array, value: Array) -> Array:
        return _attend_in_xla(query, key, value, visibility, cap)

    def fused(interpret: bool):
        return lambda query, key, value: attend_fused(query, key, value, visibility.segments, visibility.window, cap)

    return dispatch("attention", refused, BY_NAME[form], query, key, value, xla=xla, kernel=fused)


def _attend_in_xla(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length heads head_dim"],
    value: Float[Array, "batch length heads head_dim"],
    visibility: Visibility,
    cap: float | None,
) -> Float[Array, "batch length heads head_dim"]:
    length, head_dim = query.shape[1], query.shape[3]
    # Heads first, so that products are of whole matrices: twice as fast on a CPU.
    query, key, value = (jnp.swapaxes(part, 1, 2) for part in (query, key, value))
    query = query * jnp.asarray(head_dim**-0.5, query.dtype)
    if visibility.mask is None:
        mixed = _attend_in_blocks(query, key, value, visibility.segments, cap)
    elif visibility.window is None:
        mixed = _attend_in_strips(query, key, value, visibility.mask[:, 0], cap)
    else:
        block = visibility.mask.shape[2]
        key, value = (spans_of(part, block, block, fill=0, axis=2) for part in (key, value))
        mixed = _attend_masked(blocks_of(query, block, fill=0, axis=2), key, value, visibility.mask[:, None], cap)
        mixed = mixed.reshape(*query.shape[:2], -1, head_dim)[:, :, :length]
    return jnp.swapaxes(mixed, 1, 2)


def _attend_masked(
    query: Float[Array, "*batch block head_dim"],
    key: Float[Array, "*batch span head_dim"],
    value: Float[Array, "*batch span head_dim"],
    mask: Bool[Array, "*#batch block span"],
    cap: float | None,
) -> Float[Array, "*batch block head_dim"]:
    """Attention where `mask` is True; `query` is scaled already."""
    logits = jnp.matmul(query, jnp.swapaxes(key, -1, -2), preferred_element_type=jnp.float32)
    logits = jnp.where(mask, soft_cap(logits, cap), -jnp.inf)
    return jnp.matmul(jax.nn.softmax(logits, axis=-1).astype(value.dtype), value)


def _attend_in_strips(
    query: Float[Array, "batch heads length head_dim"],
    key: Float[Array, "batch heads length head_dim"],
    value: Float[Array, "batch heads length head_dim"],
    mask: Bool[Array, "batch length length"],
    cap: float | None,
) -> Float[Array, "batch heads length head_dim"]:
    """Full attention in a few strips of queries, each over the keys up to its end."""
    length = query.shape[2]
    strip = -(-length // max(1, min(4, length // MIN_STRIP_QUERIES)))
    strips = []
    for start in range(0, length, strip):
        end = min(start + strip, length)
        seen = mask[:, None, start:end, :end]
        strips.append(_attend_masked(query[:, :, start:end], key[:, :, :end], value[:, :, :end], seen, cap))
    return jnp.concatenate(strips, axis=2)


def _attend_in_blocks(
    query: Float[Array, "batch heads length head_dim"],
    key: Float[Array, "batch heads length head_dim"],
    value: Float[Array, "batch heads length head_dim"],
    segments: Int[Array, "batch length"],
    cap: float | None,
) -> Float[Array, "batch heads length head_dim"]:
    """Full attention, one block of queries after another."""
    length = query.shape[2]
    keys = Located(segments, jnp.broadcast_to(jnp.arange(length), segments.shape))

    @jax.checkpoint
    def one_block(block: tuple[Array, Located]) -> Array:
        query, queries = block
        return _attend_masked(query, key, value, visible(queries, keys, None)[:, None], cap)

    size = -(-length // -(-length // BLOCK_QUERIES))
    # The padding of the last block belongs to no document; it sees the first position, since a softmax needs one key.
    queries = Located(blocks_of(segments, size, fill=-1), blocks_of(keys.positions, size, fill=0))
    queries = jax.tree.map(lambda part: jnp.moveaxis(part, 1, 0), queries)
    mixed = jax.lax.map(one_block, (jnp.moveaxis(blocks_of(query, size, fill=0, axis=2), 2, 0), queries))
    return jnp.moveaxis(mixed, 0, 2).reshape(*query.shape[:2], -1, query.shape[3])[:, :, :length]


class BlockContext(eqx.Module):
    """What the blocks of a stack need beside the hidden states.

    For attention, `rotary` is the position embedding, and `visibility` says which of these positions see which; it is None in
    decoding once there are KV caches to attend to as well. For stacks that attend to tokens, `tokens` are the unfolded tokens
    of the inner level. Matrix products use the dtype `compute`. Mixtures of experts drop choices and report losses only in
    `training`. `implementation` is that of norms and gates.
    """

    layout: Layout
    rotary: Rotary | None
    visibility: Visibility | None
    tokens: VisibleTokens | None = None
    compute: str = eqx.field(static=True, default="float32")
    training: bool = eqx.field(static=True, default=False)
    implementation: Implementation | None = eqx.field(static=True, default=None)


class LayerOutput(eqx.Module):
    """Hidden states, the update of the layer's decode state (None in training), and in training the loss of its mixtures of
    experts, if there are any."""

    hidden: Float[Array, "batch length dim"]
    update: PyTree[Array]
    experts: ExpertLoss | None = None


class AbstractMixer(eqx.Module):
    """A causal map that mixes the positions of each document: attention or a recurrence.

    One pass serves training (no decode state) and decoding, where the new positions follow those of the state.
    """

    @property
    @abstractmethod
    def rotary_dim(self) -> int | None:
        """Dimensions of a head with rotary embeddings; None if positions are not used."""

    @abstractmethod
    def init_state(self, batch: int, window: int | None) -> PyTree[Array]:
        """The decode state before the first position."""

    @abstractmethod
    def __call__(
        self, x: Float[Array, "batch length dim"], context: BlockContext, state: PyTree[Array] = None
    ) -> LayerOutput:
        """The mixed positions, and the update of `state`."""


class Attention(AbstractMixer):
    """Multi-head self-attention with rotary embeddings and no biases (Gemma 2; without a cap, H-Net), or without rotary
    embeddings and with biases (GPT-2). Groups of heads may share their keys and values (GQA)."""

    qkv: Linear | Affine
    out: Linear | Affine
    heads: int = eqx.field(static=True)
    cap: float | None = eqx.field(static=True)
    rotated: int | None = eqx.field(static=True, default=None)
    shared_heads: int | None = eqx.field(static=True, default=None)

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        cap: float | None = 50.0,
        rotary_dim: int | None = None,
        kv_heads: int | None = None,
        linear: type[Linear] | type[Affine] = Linear,
        key: PRNGKeyArray,
    ):
        """Query, key and value share one matrix, in this order. `cap`: bound of the logits (None: none). `rotary_dim`:
        dimensions of a head with rotary embeddings (None: all). `kv_heads`: heads of keys and values (None: as many). `linear`:
        the class of both projections. Raises `ValueError` if `heads` does not divide `dim`, `kv_heads` not `heads`, or a head
        has fewer than `rotary_dim` dimensions."""
        require_within("heads", heads, Width)
        kv_heads = require_heads(dim, heads, kv_heads)
        if rotary_dim is not None and not 0 <= rotary_dim <= dim // heads:
            raise ValueError(f"rotary_dim must be between 0 and {dim // heads}, the width of a head; got {rotary_dim}")
        key_in, key_out = jax.random.split(key)
        self.qkv = linear(dim, dim + 2 * kv_heads * (dim // heads), key=key_in)
        self.out = linear(dim, dim, key=key_out)
        self.heads, self.cap, self.rotated = heads, cap, rotary_dim
        self.shared_heads = None if kv_heads == heads else kv_heads

    @property
    def rotary_dim(self) -> int | None:
        return self.head_dim if self.rotated is None else self.rotated

    @property
    def head_dim(self) -> int:
        return self.out.weight.shape[0] // self.heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.shared_heads is None else self.shared_heads

    def init_state(self, batch: int, window: int | None) -> KVCache:
        return KVCache.empty(batch, self.kv_heads, self.head_dim, window)

    def __call__(
        self, x: Float[Array, "batch length dim"], context: BlockContext, state: AnyCache | None = None
    ) -> LayerOutput:
        inner, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        parts = jnp.split(self.qkv(x), (inner, inner + shared), axis=-1)
        query, key, value = (part.reshape(*x.shape[:2], -1, self.head_dim) for part in parts)
        assert context.rotary is not None
        query, key = context.rotary(query), context.rotary(key)
        update = KVUpdate(key, value)
        if context.visibility is not None:
            key, value = (for_all_heads(part, self.heads, 2) for part in (key, value))
            mixed = attend(query, key, value, context.visibility, cap=self.cap)
        else:
            assert state is not None
            mixed = attend_cached(query, update, state, context.layout.mask, cap=self.cap)
        return LayerOutput(self.out(mixed.reshape(*x.shape[:2], -1)), None if state is None else update)
