"""Models go to files, folders and the hub, and come back from there alone."""

import functools
import json
import os
import subprocess
import sys

import equinox as eqx
import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jaxtyping import Array, Float

import unet
from estimators import AbstractPositionwiseRouter, Boundaries, Layout, RuleRouter, SamplingOptions
from estimators.routers.rules import spacelike, whitespace
from experiments.export import main as export
from experiments.training.run_dir import read_config
from tests.compositions import registered
from tests.hostile.model_subjects import saved_files
from tests.hub_server import COMMIT, hub
from tests.test_run import SMALL, start
from tests.test_run import corpus as corpus
from tests.test_run import usual_promotion as usual_promotion
from unet.files.arrays import ArrayFile, file_content
from unet.files.saving import metadata_of, write_atomically

WEIGHTS = "model.safetensors"


class Never(AbstractPositionwiseRouter):
    """A user's own router."""

    bias: Float[Array, ""]

    @property
    def rate(self) -> float | None:
        return None

    def boundaries(
        self, hidden: Float[Array, "batch length dim"], layout: Layout, options: SamplingOptions
    ) -> Boundaries:
        probs = jnp.zeros(layout.mask.shape)
        return Boundaries(options.bernoulli(probs, layout), probs, probs, layout.free, layout.starts)


def my_rule(layout: Layout):
    return layout.bytes == 65


@pytest.fixture(scope="module")
def model():
    return registered("sfe")


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whitespace"
    assert start("--estimator", "whitespace", "--dataset", corpus, "--out", folder, *SMALL) == 0
    return folder


def router_of(loaded):
    return loaded.model.stage.estimators[0].router


def with_router(model, router):
    return eqx.tree_at(lambda m: m.stage.estimator.router, model, router)


def changed(folder, change):
    """The file in `folder` with its description of the model changed, and checksums that fit it."""
    path = folder / WEIGHTS
    with ArrayFile(path) as file:
        arrays, structure = dict(file), json.loads(file.metadata["structure"])
    more = change(structure, arrays) or {}
    metadata = {**metadata_of(json.dumps(structure), arrays), **more}
    path.write_bytes(b"".join(file_content(arrays, metadata)))


def test_a_finished_run_loads_in_one_line(finished):
    loaded = unet.load(finished)
    assert loaded.config["estimator"] == "whitespace"
    assert router_of(loaded) == RuleRouter(whitespace, 0)
    by_file = unet.load(finished / WEIGHTS)
    assert eqx.tree_equal(by_file.model, loaded.model)
    text = unet.generate(loaded.model, ["a"], max_bytes=4, key=jax.random.key(0)).texts[0]
    assert len(text.piece.bytes) == 4


def test_ones_own_classes_and_rules_are_named_when_loading(model, tmp_path):
    unet.save(with_router(model, Never(jnp.asarray(1.5))), tmp_path)
    with pytest.raises(unet.LoadError, match=r"tests\.test_saving\.Never.*known="):
        unet.load(tmp_path)
    router = router_of(unet.load(tmp_path, known=[Never]))
    assert isinstance(router, Never)
    assert router.bias == 1.5
    unet.save(with_router(model, RuleRouter(my_rule, 0)), tmp_path)
    assert router_of(unet.load(tmp_path, known=[my_rule])) == RuleRouter(my_rule, 0)
    unet.save(with_router(model, RuleRouter(spacelike, 1)), tmp_path)
    assert router_of(unet.load(tmp_path)) == RuleRouter(spacelike, 1)


def test_a_file_that_cannot_be_written_leaves_nothing_beside_it(tmp_path):
    (tmp_path / "a.json" / "inside").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "a.json", "what cannot take the place of a folder")
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "estimators.routers.rules.jnp",
        "unet.files.saving.write_atomically",
        "estimators.base.Nothing",
        "builtins.eval",
        "",
    ],
)
@pytest.mark.parametrize("kind", ["function", "class"])
def test_a_file_can_name_nothing_but_our_own_modules_and_rules(model, tmp_path, name, kind):
    unet.save(model, tmp_path)
    content = {kind: name} if kind == "function" else {kind: name, "fields": {}}
    changed(tmp_path, lambda structure, arrays: structure["fields"].update(compute=content))
    with pytest.raises(unet.LoadError, match="not part of this library"):
        unet.load(tmp_path)


def remove_array(structure, arrays):
    del arrays["model.norm.weight"]


def add_array(structure, arrays):
    arrays["model.extra"] = np.zeros(2)


def twice(structure, arrays):
    structure["fields"]["norm"]["fields"]["weight"] = {"array": "model.head.weight"}


def older(structure, arrays):
    structure["fields"].pop("compute")
    structure["fields"]["precision"] = 32


def nonsense(structure, arrays):
    structure["fields"]["norm"] = {"shape": [1, 2]}


def another_format(structure, arrays):
    return {"version": "7"}


def no_model(structure, arrays):
    structure.clear()
    structure.update({"tuple": [{"array": name} for name in arrays]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_array, r"model\.norm\.weight is missing"),
        (add_array, r"its array model\.extra belongs to nothing"),
        (twice, r"the weight of its RMSNorm is an array of float32, shape \[16, 256\]"),
        (older, "another version: its UNet differs in compute, precision"),
        (nonsense, "description of the model is invalid"),
        (another_format, "has format version 7"),
        (no_model, "not a model"),
    ],
)
def test_what_does_not_fit_is_said(model, tmp_path, change, message):
    unet.save(model, tmp_path)
    changed(tmp_path, change)
    with pytest.raises(unet.LoadError, match=message):
        unet.load(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "neither a finished run"),
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "damaged"),
        (lambda path: path.write_bytes(b"junk"), "damaged"),
        (lambda path: path.write_bytes(safetensors.numpy.save({"x": np.zeros(2)})), "not written by this library"),
        (lambda path: path.with_name("config.json").write_text("{"), r"config\.json is damaged"),
        (lambda path: path.with_name("config.json").write_text("[]"), "no JSON object"),
    ],
    ids=["missing", "truncated", "junk", "another's", "configuration", "list"],
)
def test_damage_is_said_in_a_sentence(model, tmp_path, damage, message):
    unet.save(model, tmp_path)
    damage(tmp_path / WEIGHTS)
    with pytest.raises(unet.LoadError, match=message):
        unet.load(tmp_path)


def another_dtype(arrays):
    arrays["model.embedding"] = arrays["model.embedding"].astype(np.int32)


def transposed(arrays):
    arrays["model.embedding"] = arrays["model.embedding"].T.reshape(arrays["model.embedding"].shape)


def one_bit(arrays):
    arrays["model.norm.weight"].view(np.uint8)[3] ^= 1


def exchanged(arrays):
    first = "model.embedding"
    second = "model.head.weight"
    arrays[first], arrays[second] = (
        arrays[second].reshape(arrays[first].shape),
        arrays[first].reshape(arrays[second].shape),
    )


@pytest.mark.parametrize("change", [another_dtype, transposed, one_bit, exchanged])
def test_arrays_that_are_not_those_that_were_saved_are_refused(model, tmp_path, change):
    """By their checksums; a file without any, of an earlier version, is read as it is, where the kinds of its arrays fit."""
    path = unet.save(model, tmp_path)
    with ArrayFile(path) as file:
        arrays, metadata = {name: np.array(array) for name, array in file.items()}, dict(file.metadata)
    assert change(arrays) is None
    path.write_bytes(b"".join(file_content(arrays, metadata)))
    with pytest.raises(unet.LoadError, match=r"the array model\.\S+ is not the one that was saved"):
        unet.load(tmp_path)
    for without in ({"leaves"}, {"sha256"}, {"leaves", "sha256"}):
        content = {name: value for name, value in metadata.items() if name not in without}
        path.write_bytes(b"".join(file_content(arrays, content)))
        with pytest.raises(unet.LoadError, match="description of the model is not the one"):
            unet.load(tmp_path)


def test_a_file_of_the_version_without_checksums_can_be_read(model, tmp_path):
    path = unet.save(model, tmp_path)
    with ArrayFile(path) as file:
        arrays, structure = dict(file), file.metadata["structure"]
    metadata = {"format": "caesura", "version": "3", "structure": structure}
    path.write_bytes(safetensors.numpy.save(arrays, metadata))
    assert eqx.tree_equal(unet.load(tmp_path).model, model)
    # Kinds are compared without checksums too.
    path.write_bytes(safetensors.numpy.save({**arrays, "model.embedding": np.zeros((256, 16), np.int32)}, metadata))
    with pytest.raises(unet.LoadError, match="the embedding of its UNet is an array of int32"):
        unet.load(tmp_path)


@pytest.mark.parametrize(
    ("field", "content", "message"),
    [
        ("norm", 1, "the norm of its UNet is 1"),
        ("stage", {"tuple": []}, "the stage of its UNet is a tuple"),
        ("compute", "float99", "the compute of its UNet is 'float99'"),
        ("norm", {"tuple": [[]]}, "invalid, or too deep"),
        ("norm", functools.reduce(lambda inner, _: {"tuple": [inner]}, range(100), 1), "invalid, or too deep"),
        ("norm", {"class": "unet.files/../layers.RMSNorm", "fields": {}}, "not part of this library"),
        ("norm", {"class": "unet.\0.RMSNorm", "fields": {}}, r"unet\.\\x00\.RMSNorm"),
    ],
)
def test_fields_of_another_kind_are_said(model, tmp_path, field, content, message):
    unet.save(model, tmp_path)
    changed(tmp_path, lambda structure, arrays: structure["fields"].update({field: content}))
    with pytest.raises(unet.LoadError, match=message) as caught:
        unet.load(tmp_path)
    assert str(caught.value).isprintable()


SAVE_AGAIN = """
import sys
from pathlib import Path
from tests.hostile.model_subjects import saved_files
for path, content in saved_files().items():
    Path(sys.argv[1], path).write_bytes(content)
"""


def test_the_same_model_gives_the_same_bytes(tmp_path):
    """Also in another process, which orders sets and hash tables in its own way."""
    environment = {**os.environ, "PYTHONHASHSEED": "4321"}
    subprocess.run([sys.executable, "-c", SAVE_AGAIN, tmp_path], check=True, env=environment, capture_output=True)
    for _ in range(5):
        for name, content in saved_files().items():
            assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_configuration_may_begin_with_a_byte_order_mark(model, tmp_path, mark):
    unet.save(model, tmp_path)
    (tmp_path / "config.json").write_text(mark + '{"estimator": "café"}', encoding="utf-8")
    assert unet.load(tmp_path).config == {"estimator": "café"}
    for content, message in [(b"{\xff}", "not UTF-8"), (b"[" * 100_000, "too deep"), (b"{" * 100_000, "damaged")]:
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(unet.LoadError, match=message):
            unet.load(tmp_path)


def test_what_has_no_name_cannot_be_kept(model, tmp_path):
    with pytest.raises(ValueError, match=r"model\.stage\.estimator\.router\.rule is a function"):
        unet.save(with_router(model, RuleRouter(lambda layout: layout.mask, 0)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_export_is_a_model_of_its_own(finished, tmp_path, capsys):
    folder = tmp_path / "exported"
    assert export([str(finished), "--to", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", WEIGHTS]
    assert eqx.tree_equal(unet.load(folder).model, unet.load(finished).model)
    assert read_config(folder) == read_config(finished)
    page = (folder / "README.md").read_text()
    assert "bits per byte on held-out text" in page
    assert "# whitespace, tiny, trained on" in page
    assert export([str(finished), "--to", str(folder)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert export([str(tmp_path), "--to", str(tmp_path / "other")]) == 2
    assert "holds neither a run nor the weights of a model" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "other").exists()


@pytest.fixture
def models(monkeypatch, tmp_path):
    """An empty hub that takes models with a token, and a cache of its own."""
    with hub("someone/words", {}, token="secret") as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield server


def test_a_model_goes_to_the_hub_and_comes_back(finished, models):
    assert export([str(finished), "--to", "hub:someone/words", "--private"]) == 0
    assert sorted(models.files) == ["README.md", "config.json", WEIGHTS]
    assert models.created["name"] == "words"
    assert models.created["visibility"] == "private"
    for name in ("hub:someone/words", f"hub:someone/words@{COMMIT}"):
        loaded = unet.load(name)
        assert eqx.tree_equal(loaded.model, unet.load(finished).model)
        assert loaded.config["estimator"] == "whitespace"


def test_a_hub_that_refuses_is_quoted(finished, models, monkeypatch, capsys):
    with pytest.raises(unet.LoadError, match=r"hub:someone/words has no model\.safetensors"):
        unet.load("hub:someone/words")
    with pytest.raises(unet.LoadError, match="has no"):
        unet.load("hub:someone/else")
    with pytest.raises(unet.LoadError, match="is not the name of a repository"):
        unet.load("hub:a/b/c")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert export([str(finished), "--to", "hub:someone/words"]) == 2
    assert "may write" in " ".join(capsys.readouterr().err.split())
    assert not models.files
