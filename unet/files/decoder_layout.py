"""Conversion to and from the layouts in which `transformers` keeps Llamas and GPT-2s.

A configuration is the JSON object of a published `config.json`; parameters are arrays by their published names. The models are
over tokens; the tokenizer lies in a file of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import equinox as eqx
import jax
import numpy as np

from unet.attention import Attention
from unet.blocks import PreNorm, Stack
from unet.files.converted import WeightType
from unet.files.decoder_config import GPT2, LLAMA, described
from unet.files.errors import LayoutError
from unet.files.pieces import HEAD, PREFIX, Piece, PieceParams, filled, gated_layer, matrix, rows, sources, vector
from unet.hierarchy import Flat
from unet.layers import MLP, Affine, LayerNorm, Linear, RotaryScaling, ScaleNorm, SwiGLU
from unet.model import UNet
from unet.wrapped import Positioned

EMBEDDINGS = {LLAMA: "model.embed_tokens.weight", GPT2: "transformer.wte.weight"}
"""The name of the embedding, of one array with that of the head if embeddings are tied."""
PREFIXES = {LLAMA: PREFIX, GPT2: "transformer."}
"""What all names but that of the head begin with."""

BUFFERS = re.compile(r"\.(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
"""Names of constants that older versions saved among the weights."""


def from_reference(
    config: Mapping[str, object], params: Mapping[str, np.ndarray], *, dtype: WeightType = "float32"
) -> UNet:
    """The model over tokens of a published configuration and its parameters, which are read one at a time. `dtype` is that of
    weights and products.

    Raises `LayoutError` for missing and unknown names, for another shape or dtype, and for a tied head that differs from the
    embedding.
    """
    kind, parts = str(config["model_type"]), described(config, compute=dtype)
    if parts.shape.layers > len(params):
        raise LayoutError(
            f"the configuration has {parts.shape.layers} layers, more than there are parameters ({len(params)})"
        )
    try:
        skeleton = eqx.filter_eval_shape(lambda: UNet(parts.shape, None, key=jax.random.key(0), vocab=parts.vocab))
    except ValueError as error:
        raise LayoutError(f"this configuration is not a valid {kind}: {error}") from None
    pieces = list(pieces_of(skeleton))
    names = sources(
        pieces,
        params,
        EMBEDDINGS[kind],
        tied=parts.shape.tie_embeddings,
        prefix=PREFIXES[kind],
        ignored=BUFFERS,
    )
    return filled(skeleton, pieces, params, names, dtype)


def to_reference(model: UNet) -> PieceParams:
    """The parameters of a model in the layout of `transformers`: the inverse of `from_reference`. Tied embeddings appear as two
    equal arrays. Raises `LayoutError` for a model with parts that the layout does not have."""
    return PieceParams(pieces_of(model), EMBEDDINGS[kind_of(model)], tied=model.head is None)


def kind_of(model: UNet) -> str:
    """The model type in whose layout a model is. Raises `LayoutError` for a model with levels of tokens, or without a norm at the
    end."""
    stage = model.stage
    if model.norm is not None or model.early_head is not None or model.ngrams is not None:
        raise LayoutError(
            "in the layouts of Llama and GPT-2 the last layer is followed by a norm and the head, and nothing else"
        )
    if isinstance(stage, Positioned) and isinstance(stage.stage, Flat):
        return GPT2
    if not isinstance(stage, Flat) or not isinstance(stage.stack.norm, ScaleNorm):
        raise LayoutError(
            f"the layout of a Llama is that of layers with a norm at their end; this model has a {_named(stage)}"
        )
    return LLAMA


def _named(stage: object) -> str:
    return "Flat stage without one" if isinstance(stage, Flat) else type(stage).__name__


def pieces_of(model: UNet) -> Iterator[Piece]:
    """Every published parameter of a model, those of one leaf after each other. Raises `LayoutError` as `to_reference`."""
    kind = kind_of(model)
    yield rows(EMBEDDINGS[kind], model.embedding)
    if model.head is not None:
        yield matrix(HEAD, model.head)
    if kind == LLAMA:
        assert isinstance(model.stage, Flat)
        yield from _llama(model.stage.stack)
    else:
        assert isinstance(model.stage, Positioned)
        assert isinstance(model.stage.stage, Flat)
        yield rows("transformer.wpe.weight", model.stage.table)
        yield from _gpt2(model.stage.stage.stack)


def _llama(stack: Stack) -> Iterator[Piece]:
    for number, block in enumerate(stack.blocks):
        layer = f"model.layers.{number}"
        mixer, mlp = _mixer(block), block.mlp if isinstance(block, PreNorm) else None
        if (
            not isinstance(block, PreNorm)
            or not isinstance(mlp, SwiGLU)
            or not isinstance(block.before_mixer, ScaleNorm)
            or not isinstance(mixer.qkv, Linear)
            or mixer.rotary_dim != mixer.head_dim
            or stack.window is not None
        ):
            raise LayoutError(
                "layers of a Llama have RMS norms, gated MLPs, rotary embeddings of all dimensions, attention to everything "
                "before, and no biases; this model has others"
            )
        yield from gated_layer(layer, block, mixer, mlp)
    yield vector("model.norm.weight", stack.norm)


def _gpt2(stack: Stack) -> Iterator[Piece]:
    for number, block in enumerate(stack.blocks):
        layer = f"transformer.h.{number}"
        mixer, mlp = _mixer(block), block.mlp if isinstance(block, PreNorm) else None
        if (
            not isinstance(block, PreNorm)
            or not isinstance(mlp, MLP)
            or mixer.rotary_dim != 0
            or mixer.kv_heads != mixer.heads
            or stack.window is not None
        ):
            raise LayoutError(
                "layers of a GPT-2 have plain MLPs and attention without rotary embeddings; this model has others"
            )
        yield from _normed(f"{layer}.ln_1", block.before_mixer)
        yield from _affine(f"{layer}.attn.c_attn", mixer.qkv)
        yield from _affine(f"{layer}.attn.c_proj", mixer.out)
        yield from _normed(f"{layer}.ln_2", block.before_mlp)
        yield from _affine(f"{layer}.mlp.c_fc", mlp.into)
        yield from _affine(f"{layer}.mlp.c_proj", mlp.out)
    yield from _normed("transformer.ln_f", stack.norm)


def _mixer(block: object) -> Attention:
    """The attention of a layer. Raises `LayoutError` for a layer of another kind, or one that caps its logits."""
    mixer = block.mixer if isinstance(block, PreNorm) else None
    if not isinstance(mixer, Attention) or mixer.cap is not None:
        raise LayoutError(
            "layers of Llama and GPT-2 are PreNorm with attention that caps no logits; this model has others"
        )
    return mixer


def _affine(name: str, layer: Linear | Affine) -> Iterator[Piece]:
    """A matrix that is published as it is stored, and its bias."""
    if not isinstance(layer, Affine):
        raise LayoutError(f"{name} of a GPT-2 has a bias; this model has none there")
    yield rows(f"{name}.weight", layer.weight)
    yield rows(f"{name}.bias", layer.bias)


def _normed(name: str, norm: ScaleNorm | LayerNorm | None) -> Iterator[Piece]:
    if not isinstance(norm, LayerNorm):
        raise LayoutError(
            f"{name} of a GPT-2 is a layer norm with a bias; this model has a {type(norm).__name__} there"
        )
    yield rows(f"{name}.weight", norm.weight)
    yield rows(f"{name}.bias", norm.bias)


def reference_config(model: UNet, marks: tuple[int, int] | None = None) -> dict[str, object]:
    """The published configuration of a model; `marks`: the tokens that mark the start and the end of a document. Raises
    `LayoutError` as `to_reference`."""
    kind = kind_of(model)
    to_reference(model)
    ids = dict(zip(("bos_token_id", "eos_token_id"), marks or (None, None), strict=True))
    common = {
        "model_type": kind,
        "vocab_size": model.embedding.shape[0],
        "tie_word_embeddings": model.head is None,
        **ids,
    }
    flat = model.stage.stage if isinstance(model.stage, Positioned) else model.stage
    assert isinstance(flat, Flat)
    stack, dim = flat.stack, model.embedding.shape[1]
    if not stack.blocks:
        raise LayoutError(f"a {kind} has layers; this model has none")
    block, mixer = stack.blocks[0], _mixer(stack.blocks[0])
    assert isinstance(block, PreNorm)
    assert isinstance(block.mlp, SwiGLU | MLP)
    hidden = block.mlp.out.weight.shape[0]
    if isinstance(model.stage, Positioned):
        return {
            **common,
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": dim,
            "n_layer": len(stack.blocks),
            "n_head": mixer.heads,
            "n_inner": hidden,
            "n_positions": model.stage.table.shape[0],
            "activation_function": "gelu_new",
            "layer_norm_epsilon": block.before_mixer.epsilon,
        }
    return {
        **common,
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": len(stack.blocks),
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": block.before_mixer.epsilon,
        "max_position_embeddings": _positions(stack.rotary_scaling),
        "rope_parameters": _rope(stack.rotary_base, stack.rotary_scaling),
    }


def _rope(base: float, scaling: RotaryScaling | None) -> dict[str, object]:
    if scaling is None:
        return {"rope_type": "default", "rope_theta": base}
    return {
        "rope_type": "llama3",
        "rope_theta": base,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "original_max_position_embeddings": round(scaling.original),
    }


def _positions(scaling: RotaryScaling | None) -> int:
    """The positions that a configuration names. A model here has no limit: what `transformers` takes where none are named, or
    the original ones times their factor, but more than they were."""
    return 2048 if scaling is None else max(round(scaling.original * scaling.factor), round(scaling.original) + 1)
