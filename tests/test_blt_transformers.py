"""Byte Latent Transformers of several shapes against `transformers`, where that package and PyTorch are installed."""

import json

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from unet import from_blt_ids, load_pretrained, save_blt, to_reference
from unet.blt import PUBLISHED_IDS

WHY = "compares with the real transformers: install transformers and torch to run it"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

LENGTH = 40
LOCAL = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 40, "initializer_range": 0.2}


def network(base, **changes):
    return {**LOCAL, "rope_parameters": {"rope_type": "default", "rope_theta": base}, **changes}


SHAPES = {
    # Shared heads, tokens that are projected, cross-attention at every layer, patches of at most three bytes.
    "shared heads": {
        "cross_attn_k": 3,
        "max_patch_length": 3,
        "local_attention_window_len": 7,
        "encoder_hash_byte_group_size": [2, 5],
        "encoder_hash_byte_group_vocab": 101,
        "patcher_config": network(1000.0, num_key_value_heads=2, num_hidden_layers=1, sliding_window=5),
        "encoder_config": network(
            2000.0,
            num_key_value_heads=2,
            num_hidden_layers=2,
            cross_attn_k=3,
            cross_attn_all_layers=True,
            hidden_size_global=24,
        ),
        "decoder_config": network(
            3000.0, num_key_value_heads=1, num_hidden_layers=2, cross_attn_k=3, hidden_size_global=24
        ),
        "global_config": network(4000.0, hidden_size=24, num_key_value_heads=2, num_hidden_layers=1, rms_norm_eps=1e-3),
    },
    # Tied embeddings, no windows, two hash functions, cross-attention at the first layer of the decoder alone, one vector.
    "tied": {
        "cross_attn_k": 1,
        "tie_word_embeddings": True,
        "local_attention_window_len": None,
        "encoder_hash_byte_group_size": [3],
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_nb_functions": 2,
        "patcher_config": network(1000.0, num_hidden_layers=1, sliding_window=None, intermediate_size=24),
        "encoder_config": network(500.0, num_hidden_layers=1, cross_attn_k=1, hidden_size_global=16, rms_norm_eps=1e-4),
        "decoder_config": network(
            500.0, num_hidden_layers=2, cross_attn_k=1, hidden_size_global=16, cross_attn_all_layers=False
        ),
        "global_config": network(500.0, num_hidden_layers=1),
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_both_directions_agree_with_the_real_program(shape, tmp_path):
    torch.manual_seed(0)
    config = transformers.BltConfig(**SHAPES[shape], attn_implementation="eager")
    theirs = transformers.BltForCausalLM(config).eval()
    ids = torch.randint(4, 258, (2, LENGTH))
    ids[:, 0] = 1
    ids[1, 9] = 3
    with torch.no_grad():
        entropies = theirs.model.patcher(ids, patch_size=4, threshold=0.0)[0]
        theirs.config.patching_threshold = float(entropies.quantile(0.6))
        wanted = theirs(ids, use_cache=False).logits.numpy()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs").unet
    bytes = jnp.asarray(from_blt_ids(ids.numpy()))
    logits = np.asarray(eqx.filter_jit(lambda model: model(bytes).logits)(ours))
    # With a longest patch the last position of their pass does not see a patch that ends there, as it would in a longer text.
    seen = slice(None, -1) if config.max_patch_length else slice(None)
    np.testing.assert_allclose(logits[:, seen], wanted[:, seen][..., PUBLISHED_IDS], rtol=1e-4, atol=1e-4)
    save_blt(ours, tmp_path / "ours", shard_bytes=20_000)
    again = transformers.BltForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    for name, value in theirs.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name].numpy(), value.numpy(), err_msg=name)
    with torch.no_grad():
        np.testing.assert_array_equal(again(ids, use_cache=False).logits.numpy(), wanted)
    assert dict(to_reference(ours)).keys() >= dict(theirs.named_parameters()).keys()
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    for part in ("patcher_config", "encoder_config", "decoder_config", "global_config"):
        mine = written[part]
        there = {name: getattr(theirs.config, part).to_dict().get(name) for name in mine}
        assert mine == {**there, "max_position_embeddings": mine["max_position_embeddings"]}
