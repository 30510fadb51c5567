"""Llamas and GPT-2s in the layouts of transformers: golden values of the real program, files, tokenizers, and what is refused."""

import json
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from estimators.decode_state import update_state
from experiments.config.models import is_published, load_any
from unet import Tokenizer, TokenModel, generate, load, load_pretrained, save, save_tokens, score, train_tokenizer
from unet.decoding.kv_cache import with_room
from unet.files import decoder_layout
from unet.files.decoder_config import described
from unet.files.errors import LayoutError, LoadError
from unet.flops import layer_flops, matrix_flops
from unet.likelihood import next_logprobs

KINDS = ("llama", "llama-tied", "gpt2")
TEXT = b"the cat sat on the mat and the dog sat on the log; " * 40


@pytest.fixture(scope="module")
def decoders(golden):
    return golden("decoders")


def config_of(z, kind: str) -> dict[str, object]:
    return json.loads(bytes(z[f"{kind}/config"]).decode())


def params_of(z, kind: str) -> dict[str, np.ndarray]:
    prefix = f"{kind}/params/"
    return {name.removeprefix(prefix): z[name] for name in z.files if name.startswith(prefix)}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 270)


@pytest.fixture(scope="module")
def folders(decoders, tokenizer, tmp_path_factory):
    """Each golden model as a folder of the hub, its tokenizer with two special tokens behind the others."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        library = Library.from_str(np.asarray(tokenizer.json).tobytes().decode())
        library.add_special_tokens([AddedToken(f"<|{number}|>") for number in range(library.get_vocab_size(), 300)])
        (folder / "tokenizer.json").write_text(library.to_str())
        (folder / "config.json").write_text(json.dumps(config_of(decoders, kind)))
        (folder / "model.safetensors").write_bytes(safetensors.numpy.save(params_of(decoders, kind)))
        made[kind] = folder
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradient_are_those_of_the_real_program(decoders, kind):
    params = params_of(decoders, kind)
    model = decoder_layout.from_reference(config_of(decoders, kind), params)
    ids = jnp.asarray(decoders[f"{kind}/ids"])

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def loss(model):
        logits = model(ids).logits
        return -jnp.mean(next_logprobs(logits, ids)[:, :-1]), logits

    (value, logits), gradient = loss(model)
    np.testing.assert_allclose(logits, decoders[f"{kind}/logits"], rtol=1e-4, atol=1e-4)
    assert float(value) == pytest.approx(float(decoders[f"{kind}/loss"]), rel=1e-5)
    np.testing.assert_allclose(gradient.embedding, decoders[f"{kind}/gradient"], rtol=1e-3, atol=1e-5)
    back = decoder_layout.to_reference(model)
    for name, array in params.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    again = decoder_layout.reference_config(model, (298, 299))
    assert described(again).shape == described(config_of(decoders, kind)).shape
    if kind != "gpt2":
        # Positions are whole numbers, and more of them than before they were scaled.
        rope = again["rope_parameters"]
        assert isinstance(rope, dict)
        original, most = rope.get("original_max_position_embeddings", 0), again["max_position_embeddings"]
        assert isinstance(original, int)
        assert isinstance(most, int)
        assert original < most


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_cached_decoding_equals_a_full_pass(decoders, kind):
    model = decoder_layout.from_reference(config_of(decoders, kind), params_of(decoders, kind))
    ids = jnp.asarray(decoders[f"{kind}/ids"])

    decode = eqx.filter_jit(lambda model, ids, state: model.decode(ids, state))
    first = decode(model, ids[:, :12], model.init_state(2))
    state = with_room(update_state(model.init_state(2), first.update, jnp.full((2,), 12, jnp.int32)), 12)
    logits = jnp.concatenate([first.logits, decode(model, ids[:, 12:], state).logits], axis=1)
    np.testing.assert_allclose(logits, decoders[f"{kind}/logits"], rtol=1e-4, atol=1e-4)


def test_a_folder_is_a_model_of_tokens_that_scores_and_generates(folders, tmp_path):
    model = load_pretrained(folders["llama"])
    assert isinstance(model, TokenModel)
    assert is_published(str(folders["llama"]))
    assert (model.alphabet.bos, model.alphabet.eos) == (298, 299)
    # What looks like a special token is text; BOS and EOS are the tokens of the configuration.
    text = b"the cat <|299|> \xfe\xff"
    assert model.tokenizer.encode(text).tolist()[-2:] == [298, 299]
    scored = score(model, ["the cat sat"], key=jax.random.key(0))
    assert all(np.isfinite(one.logprobs).all() for one in scored)
    written = generate(model, ["the cat"], max_bytes=4, key=jax.random.key(0)).texts[0].text
    save(model, tmp_path)
    loaded = load(tmp_path).model
    assert generate(loaded, ["the cat"], max_bytes=4, key=jax.random.key(0)).texts[0].text == written
    assert matrix_flops(model, rate=0.3).total > 0 < layer_flops(model, length=64, rate=0.3).total


@pytest.mark.parametrize("kind", KINDS)
def test_models_are_written_and_read_again_in_shards_too(folders, kind, tmp_path):
    model = load_pretrained(folders[kind])
    assert isinstance(model, TokenModel)
    index = save_tokens(model, tmp_path, shard_bytes=20_000)
    assert index.name == "model.safetensors.index.json"
    assert eqx.tree_equal(load_pretrained(tmp_path), model)
    (tmp_path / "model-00002-of-00003.safetensors").unlink(missing_ok=True)
    for shard in sorted(tmp_path.glob("model-0000*"))[-1:]:
        shard.unlink()
    with pytest.raises(LoadError, match="the download is not complete"):
        load_pretrained(tmp_path)


def test_one_token_may_mark_both_ends(folders):
    model = load_any(str(folders["gpt2"])).model
    assert isinstance(model, TokenModel)
    assert (model.alphabet.bos, model.alphabet.eos) == (299, 299)
    assert model.encode(b"\xfethe\xff").tolist()[:: len(model.encode(b"\xfethe\xff")) - 1] == [299, 299]


def test_a_run_that_is_not_finished_is_no_published_model(tmp_path):
    (tmp_path / "config.json").write_text('{"estimator": "bpe"}')
    safetensors.numpy.save_file({"joined": np.zeros(3, np.uint8)}, tmp_path / "prepared.safetensors")
    with pytest.raises(LoadError, match=f"^{tmp_path} holds no model.safetensors: it is neither a finished run"):
        load_any(str(tmp_path))


def test_a_text_beyond_the_learned_positions_is_refused(folders):
    model = load_pretrained(folders["gpt2"])
    row = np.frombuffer(b"xyz" * 20, np.uint8)[None]
    batch = {"bytes": row, "segments": np.zeros(row.shape, np.int32), "mask": np.ones(row.shape, bool)}
    with pytest.raises(ValueError, match="embeddings of 32 positions, and a text of up to 60 tokens"):
        model.inputs(batch)
    with pytest.raises(ValueError, match="32 positions"):
        score(model, ["xyz" * 20], key=jax.random.key(0))
    with pytest.raises(ValueError, match="up to 34 tokens"):
        generate(model, ["xyz"], max_bytes=30, key=jax.random.key(0))


REFUSED = {
    "a part that is not known": ("llama", {"sliding_window": 128}, "sliding_window 128, which is not read"),
    "positions scaled otherwise": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        "rope_type 'yarn'",
    ),
    "a scaling that lacks a number": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
        "rope_parameters.low_freq_factor is missing",
    ),
    "pairs of neighbouring dimensions": ("llama", {"rope_interleaved": True}, "rope_interleaved is True, not False"),
    "biases": ("llama", {"attention_bias": True}, "attention_bias is True"),
    "heads of another width": ("llama", {"head_dim": 8}, "head_dim is 8, not 24 / 4"),
    "heads that do not divide": ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
    "another function": ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'"),
    "experts": ("llama", {"num_local_experts": 8}, "num_local_experts 8"),
    "another width": ("gpt2", {"n_embd": 30}, "has shape"),
    "another number of layers": ("gpt2", {"n_layer": 3}, "12 missing"),
    "another vocabulary": ("llama", {"vocab_size": 310}, "has shape"),
    "a smaller vocabulary than the tokenizer's": (
        "llama",
        {"vocab_size": 280},
        "the tokenizer has 300 tokens, and the model embeddings of 280",
    ),
    "marks that are no tokens": ("llama", {"bos_token_id": 300}, "there are 300 tokens"),
    "another kind": ("llama", {"model_type": "qwen2"}, "model_type 'qwen2' are not read"),
}


def test_what_says_nothing_of_the_function_is_left_aside(decoders):
    """As in published configurations: SmolLM's, that of the first GPT, and others."""
    harmless = dict.fromkeys(
        ("predict_special_tokens", "output_attentions", "output_hidden_states", "is_llama_config"), True
    )
    harmless |= dict.fromkeys(("n_special", "_num_labels", "num_labels", "neftune_noise_alpha"), 3)
    harmless |= {"transformers.js_config": {"dtype": "q4"}, "rope_interleaved": False}
    for kind in ("llama", "gpt2"):
        config = config_of(decoders, kind)
        assert described({**config, **harmless}) == described(config)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_in_a_sentence(folders, case, tmp_path):
    kind, changed, sentence = REFUSED[case]
    folder = tmp_path / "model"
    shutil.copytree(folders[kind], folder)
    settings = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(LoadError, match=sentence) as raised:
        load_pretrained(folder)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_that_is_missing_or_not_byte_level_is_refused(folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders["llama"], folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(LoadError, match="needs its tokenizer beside"):
        load_pretrained(folder)
    described = json.loads((folders["llama"] / "tokenizer.json").read_text())
    described["pre_tokenizer"] = described["decoder"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
    }
    (folder / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(LoadError, match="byte-level"):
        load_pretrained(folder)


def test_buffers_of_older_versions_and_names_without_a_prefix_are_read(decoders):
    params = {name.removeprefix("transformer."): array for name, array in params_of(decoders, "gpt2").items()}
    params |= {
        "h.0.attn.bias": np.ones((1, 1, 32, 32), np.float32),
        "h.0.attn.masked_bias": np.full(1, -1e4, np.float32),
    }
    model = decoder_layout.from_reference(config_of(decoders, "gpt2"), params)
    wanted = decoder_layout.from_reference(config_of(decoders, "gpt2"), params_of(decoders, "gpt2"))
    assert eqx.tree_equal(model, wanted)
    with pytest.raises(LayoutError, match="1 unknown"):
        decoder_layout.from_reference(config_of(decoders, "gpt2"), params | {"score.weight": np.ones(3, np.float32)})


def test_padding_of_a_vocabulary_stands_for_no_token(tokenizer):
    padded = tokenizer.padded(280)
    assert padded.size == 280
    assert set(padded.tokens[tokenizer.size :]) == {b""}
    assert isinstance(padded, Tokenizer)
