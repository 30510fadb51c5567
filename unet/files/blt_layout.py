"""Conversion to and from the layout in which `transformers` keeps Byte Latent Transformers (`BltForCausalLM`).

A configuration is the JSON object of a published `config.json`; parameters are arrays by their published names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import equinox as eqx
import jax
import numpy as np

from estimators.base import AbstractEstimator, Frozen
from estimators.constraints import MaxLength, constrained
from estimators.entropy import Entropy
from estimators.routers import AbstractPatchRule, Constrained, EntropyRouter, GlobalRule, RiseRule
from unet.attention import Attention
from unet.blocks import Attending, PreNorm, Stack
from unet.blt import PUBLISHED_IDS, SPECIAL_IDS
from unet.chunkers import AttentionPool, Chunker, LeaveToDecoder
from unet.cross import CrossLayer
from unet.files.blt_config import Described, described, shortest
from unet.files.converted import WeightType
from unet.files.errors import LayoutError
from unet.files.pieces import HEAD, Order, Piece, PieceParams, filled, gated_layer, matrix, rows, sources, vector
from unet.hierarchy import Flat, Hierarchy
from unet.layers import Linear, ScaleNorm, SwiGLU
from unet.model import UNet
from unet.ngrams import HashedNgrams

EMBEDDING = "model.local_encoder.embed_tokens.weight"
"""The name of the byte embedding, of one array with that of the head if embeddings are tied."""
TABLES = "model.encoder_hash_tok_embedding.weight"
"""All tables of n-grams, one below the other."""


def rule_of(parts: Described) -> AbstractPatchRule:
    """Where the entropies end a patch."""
    return RiseRule(parts.threshold) if parts.monotonic else GlobalRule(parts.threshold)


def new_blt(parts: Described) -> UNet:
    """A model of this description, with initial weights drawn with key 0."""
    key_model, key_patcher, key_pool, key_idle = jax.random.split(jax.random.key(0), 4)
    shape, width = parts.shape, parts.shape.dims[0]
    heads = {"kv_heads": shape.kv_heads[0], "epsilon": shape.epsilons[0]}
    pool = AttentionPool(
        width, shape.heads[0], vectors=shape.attend_vectors, width=shape.dims[1], key=key_pool, **heads
    )
    if parts.idle:
        keys = jax.random.split(key_idle, parts.idle)
        idle = Frozen(tuple(CrossLayer(width, shape.heads[0], key=one, **heads) for one in keys))
        pool = eqx.tree_at(lambda one: one.idle, pool, idle, is_leaf=lambda leaf: leaf is None)
    router = EntropyRouter(UNet(parts.patcher, None, key=key_patcher), rule_of(parts), target_rate=parts.rate)
    estimator: AbstractEstimator = Entropy(router, chunker=Chunker(pool, LeaveToDecoder()))
    if parts.max_patch_length is not None:
        estimator = constrained(estimator, [MaxLength(parts.max_patch_length)])
    return UNet(shape, estimator, key=key_model)


def from_reference(
    config: Mapping[str, object], params: Mapping[str, np.ndarray], *, dtype: WeightType = "float32"
) -> UNet:
    """The model of a published configuration and its parameters.

    Byte b is the id b + 4 there, BOS 1 and EOS 2 (`unet.blt.to_blt_ids`); other ids are the marks 256 … 259, which can be read
    and are never drawn. `dtype` is that of weights and products; the model whose entropies make the patches computes in float32.
    Parameters are read one at a time, and of n-gram tables one at a time, so a mapping that reads them from a file never holds
    two. If embeddings are tied, the embedding may be given by its own name, as the head, or as both. Raises `LayoutError` for
    missing and unknown names, for another shape or dtype, and for a tied head that differs from the embedding.
    """
    parts = described(config, compute=dtype)
    layers = sum(parts.shape.layers) + sum(parts.patcher.layers)
    if layers > len(params):
        raise LayoutError(f"the configuration has {layers} layers, more than there are parameters ({len(params)})")
    try:
        skeleton = eqx.filter_eval_shape(new_blt, parts)
    except ValueError as error:
        raise LayoutError(f"this configuration is not a valid Byte Latent Transformer: {error}") from None
    pieces = list(pieces_of(skeleton))
    names = sources(pieces, params, EMBEDDING, tied=parts.shape.tie_embeddings)
    skeleton = filled(skeleton, pieces, params, names, dtype)
    return eqx.tree_at(lambda model: _entropy_router(model.stage).rule, skeleton, rule_of(parts))


def to_reference(model: UNet) -> PieceParams:
    """The parameters of a model in the layout of `transformers`: the inverse of `from_reference`. Tied embeddings appear as two
    equal arrays. Raises `LayoutError` for a model with parts that the layout does not have."""
    return PieceParams(pieces_of(model), EMBEDDING, tied=model.head is None)


def is_blt(model: UNet) -> bool:
    """Whether a model is made as a Byte Latent Transformer: tokens by attention, which the decoder attends to."""
    stage = model.stage
    if not isinstance(stage, Hierarchy) or not isinstance(stage.estimator.chunker, Chunker):
        return False
    return isinstance(stage.estimator.chunker.downsampler, AttentionPool) and model.ngrams is not None


def pieces_of(model: UNet) -> Iterator[Piece]:
    """Every published parameter of a model, those of one leaf after each other. Raises `LayoutError` as `to_reference`."""
    stage, pool = hierarchy_of(model), pool_of(model)
    main = stage.inner
    if not isinstance(main, Flat):
        raise LayoutError(f"the published layout has one level of tokens, not a {type(main).__name__} inside it")
    yield rows(EMBEDDING, model.embedding, PUBLISHED_IDS)
    if model.head is not None:
        yield matrix(HEAD, model.head, PUBLISHED_IDS)
    yield from _tables(model.ngrams)
    encoder, decoder = "model.local_encoder", "model.local_decoder"
    yield from _layers(stage.encoder, encoder)
    yield matrix(f"{encoder}.patch_embedding_projection.weight", pool.unfold)
    every = (*(() if pool.idle is None else pool.idle.value), pool.cross)
    for number, cross in enumerate(every):
        yield from _cross(cross, f"{encoder}.cross_attn_layers.{number}")
    yield from _layers(main.stack, "model.global_transformer")
    if pool.project is not None:
        yield matrix("model.global_transformer.token_embedding_projection.weight", pool.project)
    yield from _layers(stage.decoder, decoder)
    assert stage.decoder.unfold is not None
    yield matrix(f"{decoder}.patch_embedding_projection.weight", stage.decoder.unfold)
    yield vector(f"{decoder}.norm.weight", stage.decoder.norm)
    attending = [block.cross for block in stage.decoder.blocks if isinstance(block, Attending)]
    for number, cross in enumerate(attending):
        yield from _cross(cross, f"{decoder}.cross_attn_layers.{number}")
    patcher = patcher_of(model)
    yield rows("model.patcher.embed_tokens.weight", patcher.embedding, PUBLISHED_IDS)
    assert isinstance(patcher.stage, Flat)
    yield from _layers(patcher.stage.stack, "model.patcher")
    yield vector("model.patcher.norm.weight", patcher.stage.stack.norm)
    assert patcher.head is not None
    yield matrix("model.patcher.lm_head.weight", patcher.head, PUBLISHED_IDS)


def hierarchy_of(model: UNet) -> Hierarchy:
    """The stage of a model in the published layout. Raises `LayoutError` where the model has none, or heads that the layout does
    not have."""
    stage = model.stage
    if not isinstance(stage, Hierarchy):
        raise LayoutError(f"the published layout is that of a model with tokens; this one has a {type(stage).__name__}")
    if model.norm is not None or model.early_head is not None or stage.decoder.norm is None:
        raise LayoutError("in the published layout the decoder ends with a norm, and there is no early-exit head")
    if stage.encoder.norm is not None or not stage.chunk_positions:
        raise LayoutError("in the published layout the encoder has no norm, and tokens have rotary positions by index")
    if not stage.decoder.blocks or stage.decoder.unfold is None:
        raise LayoutError("in the published layout the decoder attends to tokens (--unet.attend)")
    _require_marks(model)
    return stage


def pool_of(model: UNet) -> AttentionPool:
    """What makes the tokens. Raises `LayoutError` if it is not the published one."""
    chunker = hierarchy_of(model).estimator.chunker
    down, up = (chunker.downsampler, chunker.upsampler) if isinstance(chunker, Chunker) else (chunker, chunker)
    if not isinstance(down, AttentionPool) or not isinstance(up, LeaveToDecoder):
        raise LayoutError(
            f"in the published layout tokens are made by AttentionPool and left to the decoder; this model has "
            f"{type(down).__name__} and {type(up).__name__}"
        )
    return down


def _entropy_router(stage: object) -> EntropyRouter:
    assert isinstance(stage, Hierarchy)
    router = stage.estimator.router
    router = router.router if isinstance(router, Constrained) else router
    if not isinstance(router, EntropyRouter):
        raise LayoutError(
            f"in the published layout the entropies of a byte model make the patches; this model has a {type(router).__name__}"
        )
    return router


def router_of(model: UNet) -> EntropyRouter:
    """What makes the patches. Raises `LayoutError` if it is not an entropy."""
    return _entropy_router(hierarchy_of(model))


def patching_of(model: UNet) -> dict[str, object]:
    """The settings of a published configuration that say where patches end. Raises `LayoutError` for rules and constraints that
    it has no room for."""
    router, outer = router_of(model), hierarchy_of(model).estimator.router
    constraints = outer.constraints if isinstance(outer, Constrained) else ()
    if len(constraints) > 1 or not all(isinstance(one, MaxLength) for one in constraints):
        names = ", ".join(type(one).__name__ for one in constraints)
        raise LayoutError(
            f"in the published layout only the length of patches is bounded (MaxLength); this model has {names}"
        )
    if not isinstance(router.rule, GlobalRule | RiseRule):
        raise LayoutError(f"the published layout has no {type(router.rule).__name__}")
    return {
        "patching_mode": "entropy",
        "patch_size": max(1, round(1 / router.target_rate)),
        "patching_threshold": shortest(router.rule.threshold.value),
        "monotonicity": isinstance(router.rule, RiseRule),
        "max_patch_length": next((one.n for one in constraints if isinstance(one, MaxLength)), None),
    }


def patcher_of(model: UNet) -> UNet:
    """The model whose entropies make the patches. Raises `LayoutError` if it is not one that the layout has room for."""
    patcher = router_of(model).model.value
    if (
        not isinstance(patcher, UNet)
        or not isinstance(patcher.stage, Flat)
        or patcher.stage.stack.norm is None
        or patcher.head is None
        or patcher.norm is not None
        or patcher.ngrams is not None
    ):
        raise LayoutError(
            "in the published layout the model of the entropies has PreNorm layers, a norm at their end, and a head of its own, "
            "such as --model blt-patcher; this one has not"
        )
    _require_marks(patcher)
    return patcher


def _require_marks(model: UNet) -> None:
    if model.embedding.shape[0] != PUBLISHED_IDS.size:
        raise LayoutError(
            f"the published layout has {PUBLISHED_IDS.size} ids; this model has {model.embedding.shape[0]}: BLTConfig makes one "
            "that has them"
        )


def _tables(ngrams: HashedNgrams | None) -> Iterator[Piece]:
    if ngrams is None or ngrams.special != SPECIAL_IDS:
        raise LayoutError(
            "in the published layout bytes have n-gram embeddings, with the published ids; this model's have not"
        )
    buckets, dim = ngrams.tables[0].shape
    shape = (buckets * len(ngrams.tables), dim)
    for number, table in enumerate(ngrams.tables):
        yield Piece(TABLES, table, shape, rows=slice(number * buckets, (number + 1) * buckets))


def halves(width: int, heads: int) -> Order:
    """The published rows of queries or keys, of whose dimensions neighbours are rotated together, in the order in which those are
    that lie half a head apart."""
    return np.arange(width).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _layers(stack: Stack, prefix: str) -> Iterator[Piece]:
    for number, block in enumerate(stack.blocks):
        block = block.block if isinstance(block, Attending) else block
        layer = f"{prefix}.layers.{number}"
        if (
            not isinstance(block, PreNorm)
            or not isinstance(block.mixer, Attention)
            or not isinstance(block.mlp, SwiGLU)
            or not isinstance(block.before_mixer, ScaleNorm)
            or not isinstance(block.mixer.qkv, Linear)
            or stack.rotary_scaling is not None
        ):
            raise LayoutError(
                "layers of the published layout are PreNorm with attention and an MLP; this model has others"
            )
        mixer, mlp = block.mixer, block.mlp
        if mixer.cap is not None or mixer.rotary_dim != mixer.head_dim or block.before_mlp is None:
            raise LayoutError("attention in the published layout caps no logits, and rotates all dimensions of a head")
        inner, shared = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
        orders = halves(inner, mixer.heads), halves(shared, mixer.kv_heads), None
        yield from gated_layer(layer, block, mixer, mlp, orders)


def _cross(cross: CrossLayer, prefix: str) -> Iterator[Piece]:
    shared = cross.key_value.weight.shape[1] // 2
    yield vector(f"{prefix}.q_norm.weight", cross.before_query)
    yield vector(f"{prefix}.k_norm.weight", cross.before_key_value)
    yield matrix(f"{prefix}.q_proj.weight", cross.query)
    yield matrix(f"{prefix}.k_proj.weight", cross.key_value, columns=slice(0, shared))
    yield matrix(f"{prefix}.v_proj.weight", cross.key_value, columns=slice(shared, 2 * shared))
    yield matrix(f"{prefix}.o_proj.weight", cross.out)
