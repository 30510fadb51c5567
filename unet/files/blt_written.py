"""The published configuration of a Byte Latent Transformer."""

from __future__ import annotations

from collections.abc import Sequence

from unet.attention import Attention
from unet.blocks import Attending, PreNorm, Stack
from unet.blt import MARKS
from unet.cross import CrossLayer
from unet.files.blt_config import MODEL_TYPE
from unet.files.blt_layout import hierarchy_of, patcher_of, patching_of, pool_of, to_reference
from unet.files.errors import LayoutError
from unet.hierarchy import Flat
from unet.layers import SwiGLU
from unet.model import UNet

MAX_POSITIONS = {"encoder_config": 24576, "decoder_config": 24576, "global_config": 4096, "patcher_config": 8192}
"""Positions that the published configurations name. Nothing depends on them."""


def reference_config(model: UNet) -> dict[str, object]:
    """The published configuration of a model. Raises `LayoutError` for one with parts that the layout does not have."""
    to_reference(model)
    stage, pool, patcher = hierarchy_of(model), pool_of(model), patcher_of(model)
    main, patches = stage.inner, patcher.stage
    assert isinstance(main, Flat)
    assert isinstance(patches, Flat)
    ngrams, dim = model.ngrams, model.embedding.shape[1]
    assert ngrams is not None
    width = pool.token_dim(dim)
    vectors = pool.unfold.weight.shape[1] // dim
    attending = [isinstance(block, Attending) for block in stage.decoder.blocks]
    if any(attending[1:]) and not all(attending):
        raise LayoutError("in the published layout the first layer of the decoder attends to tokens, or every one")
    if stage.decoder.unfold is None or stage.decoder.unfold.weight.shape[1] != vectors * dim:
        raise LayoutError(
            f"in the published layout the decoder unfolds a token into as many vectors as it is made of, {vectors}"
        )
    if stage.encoder.window != stage.decoder.window or main.stack.window is not None:
        raise LayoutError("in the published layout encoder and decoder have one window, and the main network has none")
    every = (*(() if pool.idle is None else pool.idle.value), pool.cross)
    crossed = {"vocab_size": MARKS, "cross_attn_k": vectors, "hidden_size_global": width}
    encoder_crosses, decoder_crosses = list(every), [b.cross for b in stage.decoder.blocks if isinstance(b, Attending)]
    return {
        "architectures": ["BltForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": str(model.embedding.dtype),
        "vocab_size": MARKS,
        "max_position_embeddings": MAX_POSITIONS["global_config"],
        "patch_in_forward": True,
        **patching_of(model),
        "local_attention_window_len": stage.encoder.window,
        "cross_attn_k": vectors,
        "encoder_hash_byte_group_size": list(ngrams.sizes),
        "encoder_hash_byte_group_vocab": ngrams.tables[0].shape[0],
        "encoder_hash_byte_group_nb_functions": len(ngrams.primes),
        "tie_word_embeddings": model.head is None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "encoder_config": {
            **_network("encoder_config", stage.encoder, encoder_crosses),
            **crossed,
            "cross_attn_all_layers": len(every) == len(stage.encoder.blocks) > 1,
        },
        "global_config": _network("global_config", main.stack),
        "decoder_config": {
            **_network("decoder_config", stage.decoder, decoder_crosses),
            **crossed,
            "cross_attn_all_layers": all(attending),
        },
        "patcher_config": {
            **_network("patcher_config", patches.stack),
            "vocab_size": MARKS,
            "sliding_window": patches.stack.window,
        },
    }


def _network(name: str, stack: Stack, crosses: Sequence[CrossLayer] = ()) -> dict[str, object]:
    """The settings of one network. Raises `LayoutError` if its layers have not all the same, or there are none."""
    blocks = [block.block if isinstance(block, Attending) else block for block in stack.blocks]
    layers = [
        (block, block.mixer) for block in blocks if isinstance(block, PreNorm) and isinstance(block.mixer, Attention)
    ]
    norms = [stack.norm] if stack.norm is not None else []
    norms += [norm for block, _ in layers for norm in (block.before_mixer, block.before_mlp) if norm is not None]
    norms += [norm for cross in crosses for norm in (cross.before_query, cross.before_key_value)]
    kinds = {(mixer.heads, mixer.kv_heads) for _, mixer in layers} | {(one.heads, one.kv_heads) for one in crosses}
    widths = {block.mlp.out.weight.shape[0] for block, _ in layers if isinstance(block.mlp, SwiGLU)}
    epsilons = {norm.epsilon for norm in norms}
    if not layers or len(layers) < len(blocks) or max(map(len, (kinds, widths, epsilons))) > 1:
        raise LayoutError(
            "in the published layout all layers of a network have the same heads, widths and epsilons; in the "
            f"{name} of this model they differ, or there are none"
        )
    (heads, kv_heads), dim = kinds.pop(), layers[0][1].out.weight.shape[1]
    return {
        "hidden_size": dim,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": widths.pop(),
        "rms_norm_eps": epsilons.pop(),
        "dropout": 0.0,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS[name],
        "rope_parameters": {"rope_type": "default", "rope_theta": stack.rotary_base},
    }
