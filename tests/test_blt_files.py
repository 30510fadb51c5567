"""Files of Byte Latent Transformers: configurations, shards, tokenizers, the hub, and the commands that read and write them."""

import dataclasses
import json

import equinox as eqx
import huggingface_hub.constants
import jax
import numpy as np
import pytest
import safetensors.numpy

from estimators.entropy import Measured
from experiments import export
from experiments.config.build import build_model
from experiments.config.errors import ConfigError
from experiments.config.files import to_json
from experiments.config.models import is_published
from experiments.config.presets import PRESETS
from experiments.training.initial import initial_weights
from experiments.training.text import read_byte_model
from tests.hub_server import hub
from unet import (
    LoadError,
    UNet,
    from_reference,
    load_hnet,
    load_pretrained,
    reference_config,
    save,
    save_blt,
    to_reference,
)
from unet.files.arrays import ArrayFile, rows_of
from unet.files.blt_config import WHOLE, described
from unet.files.blt_layout import TABLES, new_blt, patcher_of, pieces_of
from unet.files.errors import LayoutError
from unet.files.pretrained import parameter_count

PARTS = ("patcher_config", "encoder_config", "decoder_config", "global_config")


@pytest.fixture(scope="module")
def config(golden):
    return json.loads(str(golden("blt")["config"]))


@pytest.fixture(scope="module")
def params(golden):
    z = golden("blt")
    return {name.removeprefix("param."): z[name] for name in z.files if name.startswith("param.")}


@pytest.fixture(scope="module")
def model(config, params):
    return from_reference(config, params)


def changed(config, path, value):
    """The configuration with one setting changed, such as `encoder_config.hidden_act`."""
    part, _, name = path.rpartition(".")
    return {**config, part: {**config[part], name: value}} if part else {**config, name: value}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("vocab_size", 32000, "vocab_size is 32000, not 260: its tokenizer does not fit"),
        ("patcher_config.vocab_size", 256, "patcher_config.vocab_size is 256, not 260: its tokenizer does not fit"),
        ("bos_token_id", 0, "bos_token_id is 0, not 1: its tokenizer does not fit"),
        ("eos_token_id", [2, 3], r"eos_token_id is \[2, 3\], not 2: its tokenizer does not fit"),
        ("patching_mode", "space", "only models whose own entropies make the patches are read"),
        ("patch_in_forward", False, "only models that bring the model of their patches are read"),
        ("patching_threshold_add", 0.3, "second threshold, which no published model has"),
        ("patching_threshold", None, "patching_threshold must be a number of at least"),
        ("max_patch_length", 0, "max_patch_length must be a whole number from 1"),
        ("monotonicity", 1, "monotonicity must be true or false; got 1"),
        ("encoder_hash_byte_group_size", 3, "encoder_hash_byte_group_size must be a list of whole numbers"),
        ("encoder_hash_byte_group_size", [1], "not a valid Byte Latent Transformer: ngrams must be"),
        ("encoder_hash_byte_group_nb_functions", 12, "from 1 to 11; got 12"),
        ("encoder_config.hidden_act", "gelu", "encoder_config.hidden_act is 'gelu', not 'silu': gates are SiLU"),
        ("global_config.dropout", 0.1, "no published model has dropout"),
        ("global_config.num_hidden_layers", 10**6, "global_config.num_hidden_layers must be a whole number from 0"),
        ("decoder_config.hidden_size", 64, "decoder_config.hidden_size is 64, but encoder_config.hidden_size 32"),
        ("decoder_config.cross_attn_k", 3, "decoder_config.cross_attn_k is 3, but cross_attn_k 2"),
        ("decoder_config.num_key_value_heads", 3, "kv_heads divide heads"),
        ("decoder_config.head_dim", 16, "decoder_config.head_dim is 16, not 32 / 4"),
        ("patcher_config.rope_parameters", {"rope_type": "llama3"}, "no published model scales its positions"),
        ("patcher_config.rope_parameters", {"rope_theta": 0.5}, "patcher_config.rope_theta must be a number of at"),
        ("patcher_config.rms_norm_eps", 0, "epsilons must be a number from"),
        ("patcher_config", [], r"patcher_config must be an object with settings; got \[\]"),
    ],
)
def test_a_configuration_that_no_published_model_has_is_refused_in_a_sentence(config, path, value, message):
    with pytest.raises(LayoutError, match=message):
        described(changed(config, path, value))


def test_what_a_configuration_leaves_out_is_as_usual(config):
    least = described({"model_type": "blt"})
    usual = {"remat": False, "mlp_dims": (8 * 1024 // 3, 5632, 2816)}
    assert vars(least.shape) == vars(PRESETS["blt-1B"].unet) | usual
    assert vars(least.patcher) == vars(PRESETS["blt-patcher"].unet) | {"remat": False}
    assert (least.threshold, least.monotonic, least.max_patch_length) == (WHOLE["patching_threshold"], False, None)
    # As older configurations have it.
    old = {"rope_theta": 7.0, "rope_scaling": {"rope_type": "default"}, "rope_parameters": None}
    assert described(changed(config, "global_config", config["global_config"] | old)).shape.rotary_bases[1] == 7.0


@pytest.mark.parametrize(("name", "count"), [("blt-1B", 4_633_391_872), ("blt-7B", 10_653_082_624)])
def test_presets_have_the_published_shapes(name, count):
    config, patcher = PRESETS[name], PRESETS["blt-patcher"].unet

    def build():
        byte_model = UNet(patcher, None, key=jax.random.key(1))
        return build_model(config, jax.random.key(0), Measured(byte_model, 1.335442066192627))

    model = eqx.filter_eval_shape(build)
    assert parameter_count(model) == count
    tables = sum(table.size for table in model.ngrams.tables)
    assert tables == 6 * 500_002 * config.unet.widths[0]
    # The networks without the tables and the byte model (99.5 M): 1.46 and 6.71 thousand million.
    rest = count - tables - sum(leaf.size for leaf in jax.tree.leaves(patcher_of(model)))
    assert rest == {"blt-1B": 1_461_867_520, "blt-7B": 6_713_555_200}[name]


def test_wider_tokens_thresholds_on_rises_and_longest_patches_come_back(config):
    """What the golden model does not have. (That its values are right is for `test_blt_transformers.py`.)"""
    changes = {
        "monotonicity": True,
        "max_patch_length": 7,
        "tie_word_embeddings": True,
        "encoder_config": config["encoder_config"]
        | {"num_key_value_heads": 2, "num_hidden_layers": 2, "cross_attn_all_layers": True},
        "decoder_config": config["decoder_config"] | {"hidden_size_global": 48, "cross_attn_all_layers": False},
        "global_config": config["global_config"] | {"hidden_size": 48, "head_dim": 12},
    }
    wanted, rng = {**config, **changes}, np.random.default_rng(0)
    shapes = {piece.name: piece.shape for piece in pieces_of(eqx.filter_eval_shape(new_blt, described(wanted)))}
    params = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    params["lm_head.weight"] = params["model.local_encoder.embed_tokens.weight"]
    assert sum("cross_attn_layers" in name for name in params) == 3 * 6
    model = from_reference(wanted, params)
    assert described(reference_config(model)) == described(wanted)
    back = to_reference(model)
    assert back.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    only = {name: value for name, value in params.items() if name != "lm_head.weight"}
    assert eqx.tree_equal(from_reference(reference_config(model), only), model)
    # As a file is read in which all names begin alike.
    short = {name.removeprefix("model."): value for name, value in only.items()}
    assert eqx.tree_equal(from_reference(reference_config(model), short), model)
    with pytest.raises(LayoutError, match=r"lm_head\.weight is not equal to model\.local_encoder\.embed_tokens"):
        from_reference(reference_config(model), {**params, "lm_head.weight": -params["lm_head.weight"]})


def test_parameters_that_do_not_fit_are_named(config, params):
    with pytest.raises(LayoutError, match=r"1 missing \(such as model\.patcher\.norm\.weight\), 0 unknown"):
        from_reference(config, {name: value for name, value in params.items() if "patcher.norm" not in name})
    with pytest.raises(
        LayoutError, match=r"encoder_hash_tok_embedding\.weight has shape \[12, 32\]; the configuration"
    ):
        from_reference(config, {**params, TABLES: params[TABLES][:12]})
    with pytest.raises(LayoutError, match="4000 layers, more than there are parameters"):
        from_reference(changed(config, "global_config.num_hidden_layers", 3995), params)
    with pytest.raises(LayoutError, match="chunk_sizes are for H-Nets"):
        from_reference(config, params, chunk_sizes=[4.0])


def test_bfloat16_weights_come_back_and_the_patcher_computes_in_float32(config, params, tmp_path):
    half = from_reference(config, params, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(eqx.filter(patcher_of(half), eqx.is_array))} == {"bfloat16"}
    assert (half.compute, patcher_of(half).compute) == ("bfloat16", "float32")
    save_blt(half, tmp_path)
    assert eqx.tree_equal(load_pretrained(tmp_path, dtype="bfloat16"), half)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_are_written_and_read_and_missed(model, tmp_path):
    index = save_blt(model, tmp_path, shard_bytes=300_000)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert index.name == "model.safetensors.index.json"
    assert shards == [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    assert len(shards) > 2
    assert eqx.tree_equal(load_pretrained(tmp_path), model)
    with pytest.raises(
        LoadError, match=r"is a Byte Latent Transformer, not an H-Net: load it with unet\.load_pretrained"
    ):
        load_hnet(tmp_path)
    (tmp_path / shards[1]).unlink()
    with pytest.raises(LoadError, match=f"names {shards[1]}, which is not there: the download is not complete"):
        load_pretrained(tmp_path)


def test_some_rows_of_an_array_are_read_alone(tmp_path, monkeypatch):
    arrays = {"a": np.arange(12, dtype=np.float32).reshape(6, 2)}
    (tmp_path / "w.safetensors").write_bytes(safetensors.numpy.save(arrays))
    with ArrayFile(tmp_path / "w.safetensors") as file:
        np.testing.assert_array_equal(rows_of(file, "a", slice(2, 4)), arrays["a"][2:4])
        monkeypatch.setattr(ArrayFile, "__getitem__", lambda file, name: pytest.fail("all of it was read"))
        assert file.shape("a") == (6, 2)
        np.testing.assert_array_equal(file.rows("a", slice(2, 4)), arrays["a"][2:4])
    np.testing.assert_array_equal(rows_of(arrays, "a", slice(2, 4)), arrays["a"][2:4])


TOKENIZERS = [
    ({"model": {"vocab": {"A": 69, "Ġ": 36, "é": 237, "<s>": 1}}}, None),
    ({"model": {"vocab": {"the": 262}}}, "its token 'the' has the id 262, but the model has 260 ids"),
    ({"model": {"vocab": {"A": 65}}}, "its token 'A' has the id 65, but the model's id is 69"),
    ({"model": {"vocab": {"<0x41>": 65}}}, "its token '<0x41>' has the id 65, but the model's id is 69"),
    ({"model": {"vocab": {"zz": 7}}}, "its token 'zz' has 7, the id of a byte"),
    ({"model": {"vocab": [["a", -1.0]]}}, "its vocabulary is not one of tokens with ids"),
    ({"added_tokens": [{"content": "</s>", "id": 3}]}, "its token '</s>' has the id 3, but the model's id is 2"),
]


def test_a_model_comes_from_the_hub_and_a_tokenizer_must_fit_it(model, tmp_path, monkeypatch):
    save_blt(model, str(tmp_path / "here"), shard_bytes=300_000)
    files = {one.name: one.read_bytes() for one in (tmp_path / "here").iterdir()}
    with hub("facebook/blt-1b", files | {"tokenizer.json": json.dumps(TOKENIZERS[0][0]).encode()}) as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        assert eqx.tree_equal(load_pretrained("facebook/blt-1b"), model)
    for content, message in TOKENIZERS[1:]:
        (tmp_path / "here" / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(LoadError, match=f"tokenizer.json does not fit: {message}"):
            load_pretrained(tmp_path / "here")


def test_configurations_of_the_authors_own_are_told_apart(model, tmp_path):
    save_blt(model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"args": {"dim_global": 2048}}))
    with pytest.raises(LoadError, match="the authors' own layout: name a repository converted for transformers"):
        load_pretrained(tmp_path)


@pytest.fixture
def tiny():
    """A run of `--model blt-tiny` whose entropies come from `--model blt-patcher-tiny`, and its model."""
    return PRESETS["blt-tiny"], build_model(PRESETS["blt-tiny"], jax.random.key(1), Measured(tiny_byte_model(), 1.25))


def tiny_byte_model():
    return build_model(PRESETS["blt-patcher-tiny"], jax.random.key(2)).unet


def test_runs_start_from_published_weights_and_are_exported_again(tiny, tmp_path, capsys):
    config, made = tiny
    save_blt(made, tmp_path / "published")
    # The byte model, and then everything, the threshold included.
    byte_model = read_byte_model(tmp_path / "published")
    assert eqx.tree_equal(byte_model, patcher_of(load_pretrained(tmp_path / "published").unet))
    fresh = build_model(config, jax.random.key(5), Measured(byte_model, 3.0))
    started = initial_weights(str(tmp_path / "published"), fresh)
    assert reference_config(started.unet)["patching_threshold"] == 1.25
    assert eqx.tree_equal(eqx.filter(started, eqx.is_array), eqx.filter(made, eqx.is_array))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(to_json(config))
    save(started, tmp_path / "run")
    assert export.main([str(tmp_path / "run"), "--to", str(tmp_path / "out"), "--layout", "blt"]) == 0
    assert "unet.load_pretrained" in capsys.readouterr().out + (tmp_path / "out" / "README.md").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert is_published(str(tmp_path / "out"))
    assert is_published("facebook/blt-1b")
    assert not is_published(str(tmp_path / "run"))
    assert not is_published(str(tmp_path / "nothing"))
    assert eqx.tree_equal(load_pretrained(tmp_path / "out"), load_pretrained(tmp_path / "published"))
    assert export.main([str(tmp_path / "run"), "--to", str(tmp_path / "other"), "--layout", "hnet-pt"]) == 2
    assert "released layout has" in " ".join(capsys.readouterr().err.split())


def test_weights_with_other_settings_are_refused_or_said(tiny, tmp_path):
    config, made = tiny
    save_blt(made, tmp_path)

    def fresh(**changed):
        shape = dataclasses.replace(config, unet=dataclasses.replace(config.unet, **changed))
        return build_model(shape, jax.random.key(5), Measured(tiny_byte_model(), 3.0))

    with pytest.raises(ConfigError, match=r"but other settings: .*heads is 4 there and 2 here"):
        initial_weights(str(tmp_path), fresh(heads=(2, 2, 2), kv_heads=(2, 2, 2)))
    with pytest.raises(ConfigError, match=r"rotary_base is 500000\.0 there and 100\.0 here"):
        initial_weights(str(tmp_path), fresh(rotary_bases=(5e5, 100.0, 5e5)))
    notes = []
    initial_weights(str(tmp_path), fresh(windows=(8, 0, 16)), (), notes.append)
    assert "window is 16 there and 8 here" in notes[0]
    initial_weights(str(tmp_path), fresh(), (), notes.append)
    assert len(notes) == 1


def test_a_mistyped_path_is_not_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_published("runs/a-1.5")
    (tmp_path / "runs").mkdir()
    assert not is_published("runs/a-1.5")
    assert not is_published("owner/name.safetensors")
