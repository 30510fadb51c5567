"""The small Byte Latent Transformer of the golden file, put together of this library's parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from estimators import Entropy, EntropyRouter, GlobalRule
from unet import AttentionPool, Chunker, Flat, Hierarchy, LeaveToDecoder, UNet, UNetConfig
from unet.attention import Attention
from unet.blocks import AbstractBlock, Attending, PreNorm, Stack
from unet.cross import CrossLayer
from unet.layers import Linear, RMSNorm, ScaleNorm, SwiGLU
from unet.ngrams import HashedNgrams

Arrays = Mapping[str, Array]
Layer = Callable[[str], Array]
KEY = jax.random.key(0)


def settings(golden: Mapping[str, np.ndarray]) -> dict:
    """The configuration, as published models have it."""
    return json.loads(str(golden["config"]))


def parameters(golden: Mapping[str, np.ndarray]) -> dict[str, Array]:
    """All parameters by their published names."""
    return {name.removeprefix("param."): jnp.asarray(golden[name]) for name in golden if name.startswith("param.")}


def linear(*weights: Array) -> Linear:
    """One layer for weights in the published layout (outputs × inputs), side by side."""
    joined = jnp.concatenate(weights, axis=0).T
    return eqx.tree_at(lambda layer: layer.weight, Linear(*joined.shape, key=KEY), joined)


def scale(weight: Array) -> ScaleNorm:
    """A norm with this weight."""
    return eqx.tree_at(lambda norm: norm.weight, ScaleNorm(weight.shape[0]), weight)


def norm(weight: Array) -> RMSNorm:
    """The same as a norm that multiplies by 1 more than its weight."""
    return eqx.tree_at(lambda norm: norm.weight, RMSNorm(weight.shape[0], 1e-5), weight - 1)


def halves(weight: Float[Array, "inner dim"], heads: int) -> Float[Array, "inner dim"]:
    """Rows of queries or keys whose neighbours turn together, so that they turn with those half a head away."""
    apart = weight.reshape(heads, -1, 2, weight.shape[1])
    return jnp.swapaxes(apart, 1, 2).reshape(weight.shape)


def block(at: Layer, heads: int) -> PreNorm:
    """A transformer layer."""
    dim = at("self_attn.o_proj").shape[0]
    query, key = (halves(at(f"self_attn.{name}_proj"), heads) for name in "qk")
    attention = Attention(dim, heads, cap=None, key=KEY)
    attention = eqx.tree_at(
        lambda one: (one.qkv, one.out),
        attention,
        (linear(query, key, at("self_attn.v_proj")), linear(at("self_attn.o_proj"))),
    )
    mlp = eqx.tree_at(
        lambda one: (one.value_gate, one.out),
        SwiGLU(dim, 1, key=KEY),
        (linear(at("mlp.up_proj"), at("mlp.gate_proj")), linear(at("mlp.down_proj"))),
    )
    norms = scale(at("input_layernorm")), scale(at("post_attention_layernorm"))
    return eqx.tree_at(lambda one: (one.before_mixer, one.before_mlp), PreNorm(dim, attention, mlp), norms)


def cross_layer(at: Layer, heads: int) -> CrossLayer:
    """A cross-attention layer."""
    parts = (
        scale(at("q_norm")),
        scale(at("k_norm")),
        linear(at("q_proj")),
        linear(at("k_proj"), at("v_proj")),
        linear(at("o_proj")),
    )
    return eqx.tree_at(
        lambda one: (one.before_query, one.before_key_value, one.query, one.key_value, one.out),
        CrossLayer(at("q_proj").shape[0], heads, key=KEY),
        parts,
    )


def stack(arrays: Arrays, name: str, config: Mapping, *, window: int | None, unfold: Linear | None = None) -> Stack:
    """The layers of one network, with the cross-attention before each where tokens are unfolded."""
    heads = config["num_attention_heads"]
    blocks: list[AbstractBlock] = []
    for number in range(config["num_hidden_layers"]):
        made = block(lambda part, n=number: arrays[f"{name}.layers.{n}.{part}.weight"], heads)
        if unfold is None:
            blocks.append(made)
            continue
        at = cross_layer(lambda part, n=number: arrays[f"{name}.cross_attn_layers.{n}.{part}.weight"], heads)
        blocks.append(Attending(at, made))
    return Stack(blocks, window=window, unfold=unfold, rotary_base=config["rope_parameters"]["rope_theta"])


def model_of(
    embedding: Array, stage: Flat | Hierarchy, after: RMSNorm, head: Linear, ngrams: HashedNgrams | None
) -> UNet:
    """A model of these parts."""
    made = UNet(UNetConfig(2, 1, 0, 0, 0), None, key=KEY)
    parts = (embedding, stage, after, head, ngrams)
    return eqx.tree_at(
        lambda m: (m.embedding, m.stage, m.norm, m.head, m.ngrams), made, parts, is_leaf=lambda part: part is None
    )


def small_patcher(arrays: Arrays, config: Mapping) -> UNet:
    """The byte model whose entropies make the patches."""
    inside = config["patcher_config"]
    layers = stack(arrays, "model.patcher", inside, window=inside["sliding_window"])
    after, head = norm(arrays["model.patcher.norm.weight"]), linear(arrays["model.patcher.lm_head.weight"])
    return model_of(arrays["model.patcher.embed_tokens.weight"], Flat(layers), after, head, None)


def small_blt(arrays: Arrays, config: Mapping) -> UNet:
    """The whole model. Its bytes are the published ids."""
    encoder, decoder, vectors = "model.local_encoder", "model.local_decoder", config["cross_attn_k"]
    heads, window = config["encoder_config"]["num_attention_heads"], config["encoder_config"]["sliding_window"]
    dim = config["encoder_config"]["hidden_size"]
    pool = eqx.tree_at(
        lambda one: (one.unfold, one.cross),
        AttentionPool(dim, heads, vectors=vectors, key=KEY),
        (
            linear(arrays[f"{encoder}.patch_embedding_projection.weight"]),
            cross_layer(lambda part: arrays[f"{encoder}.cross_attn_layers.0.{part}.weight"], heads),
        ),
    )
    rule = GlobalRule(config["patching_threshold"])
    router = EntropyRouter(small_patcher(arrays, config), rule, target_rate=0.25)
    unfold = linear(arrays[f"{decoder}.patch_embedding_projection.weight"])
    stage = Hierarchy(
        stack(arrays, encoder, config["encoder_config"], window=window),
        Entropy(router, chunker=Chunker(pool, LeaveToDecoder())),
        Flat(stack(arrays, "model.global_transformer", config["global_config"], window=None)),
        stack(arrays, decoder, config["decoder_config"], window=window, unfold=unfold),
        chunk_positions=True,
    )
    sizes, buckets = config["encoder_hash_byte_group_size"], config["encoder_hash_byte_group_vocab"]
    ngrams = HashedNgrams(dim, sizes, buckets, offset=0, key=KEY)
    tables = tuple(jnp.split(arrays["model.encoder_hash_tok_embedding.weight"], len(sizes)))
    ngrams = eqx.tree_at(lambda one: one.tables, ngrams, tables)
    after, head = norm(arrays[f"{decoder}.norm.weight"]), linear(arrays["lm_head.weight"])
    return model_of(arrays[f"{encoder}.embed_tokens.weight"], stage, after, head, ngrams)
