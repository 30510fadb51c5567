"""Published weights as other people's programs leave them: prefixes, shards with an index, other dtypes; and odd hubs."""

import json

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.numpy

from tests.hub_server import COMMIT, hub
from tests.test_pretrained import small as small
from unet import LoadError, load_hnet
from unet.files.arrays import ArrayFile
from unet.files.errors import LONGEST, LayoutError
from unet.files.hnet_layout import from_reference
from unet.files.hub import WAITS, Repository
from unet.files.published import shape_of
from unet.files.weights import only_weights, open_weights, read_index

ARRAYS = {f"{name}.weight": np.full(2, number, np.float32) for number, name in enumerate("abc")}


def written(path, arrays):
    path.write_bytes(safetensors.numpy.save(arrays))
    return path


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["_orig_mod.a", "_orig_mod.b"], ["a", "b"]),
        (["module.a", "module.b"], ["a", "b"]),
        (["module._orig_mod.a", "module._orig_mod.b"], ["a", "b"]),
        (["_orig_mod.module.a", "_orig_mod.module.b"], ["a", "b"]),
        (["a._orig_mod.x", "b"], ["a.x", "b"]),
        (["model.a", "model.b"], ["a", "b"]),
        (["module.a", "b"], ["b", "module.a"]),
        (["_orig_mod.a", "a"], ["_orig_mod.a", "a"]),
        (["modulea", "moduleb"], ["modulea", "moduleb"]),
    ],
)
def test_what_compilers_and_wrappers_put_before_names_is_taken_off(tmp_path, names, found):
    arrays = {name: np.full(1, number, np.float32) for number, name in enumerate(sorted(names))}
    read = open_weights(written(tmp_path / "w.safetensors", arrays))
    assert sorted(read) == sorted(found)
    assert len(read) == 2
    assert sorted(float(read[name][0]) for name in read) == [0.0, 1.0]
    assert "c" not in read


def sharded(folder, weight_map=None, files=None):
    files = {"x-1.safetensors": ["a.weight", "b.weight"], "x-2.safetensors": ["c.weight"]} if files is None else files
    for file, names in files.items():
        written(folder / file, {name: ARRAYS[name] for name in names})
    places = {name: file for file, names in files.items() for name in names} if weight_map is None else weight_map
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def test_shards_are_read_through_their_index(tmp_path):
    index = only_weights(sharded(tmp_path))
    read = open_weights(index)
    assert set(read) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(read[name], array)
    written(tmp_path / "other.safetensors", ARRAYS)
    with pytest.raises(LoadError, match=r"it holds model\.safetensors\.index\.json, other\.safetensors"):
        only_weights(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a.weight": "../x-1.safetensors"}, r"in \.\./x-1\.safetensors, which is no safetensors file beside it"),
        ({"a.weight": "/x-1.safetensors"}, "no safetensors file beside it"),
        ({"a.weight": "..\\x-1.safetensors"}, "no safetensors file beside it"),
        ({"a.weight": "x.bin"}, "no safetensors file beside it"),
        ({"a.weight": 1}, "no safetensors file beside it"),
        ({"a.weight": "\x1b.safetensors"}, r"in \\x1b\.safetensors"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
        ({"a.weight": "gone.safetensors"}, r"names gone\.safetensors, which is not there"),
        ({"a.weight": "x-1.safetensors"}, r"do not belong together: b\.weight"),
        ({**dict.fromkeys(["a.weight", "b.weight", "d"], "x-1.safetensors")}, "do not belong together: d"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, weight_map, message):
    sharded(tmp_path, weight_map)
    with pytest.raises(LoadError, match=message):
        open_weights(tmp_path / "model.safetensors.index.json")


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32", "float8_e5m2"])
def test_weights_of_other_dtypes_are_converted_or_named(tmp_path, small, dtype):
    config, params, model = small
    exact = {name: array.astype(np.float16) for name, array in params.items()}
    if dtype == "float8_e5m2":
        header = json.dumps({"a": {"dtype": "F8_E5M2", "shape": [2], "data_offsets": [0, 2]}}).encode()
        (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
        with pytest.raises(LoadError, match="the array a cannot be read"):
            ArrayFile(tmp_path / "w.safetensors")["a"]
        return
    weights = {name: array.astype(dtype) for name, array in exact.items()}
    if dtype == "int32":
        with pytest.raises(LayoutError, match="is int32; weights must be float64"):
            from_reference(config, weights)
        return
    read = from_reference(config, weights)
    np.testing.assert_array_equal(read.embedding, exact["embeddings.weight"].astype(np.float32))
    assert read.embedding.dtype == model.embedding.dtype
    large = {**weights, "embeddings.weight": np.full(params["embeddings.weight"].shape, 1e300)}
    with pytest.raises(LayoutError, match=r"embeddings\.weight has values that are too large for float32"):
        from_reference(config, large)


def test_a_name_that_is_missing_is_named(tmp_path, small):
    config, params, _ = small
    weights = written(
        tmp_path / "w.safetensors", {name: array for name, array in params.items() if "lm_head" not in name}
    )
    (tmp_path / "w.json").write_text("\ufeff" + json.dumps(config), encoding="utf-8")
    for path in (weights, tmp_path):
        with pytest.raises(LoadError, match=r"1 missing \(such as lm_head\.weight\), 0 unknown"):
            load_hnet(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": [10**30, 10**30]}, "whole numbers of at most"),
        ({"d_model": [-5, 64]}, "whole numbers of at most"),
        ({"ssm_cfg": {"d_state": 10**30}}, "at most"),
        ({"arch_layout": ["m4000", ["T4000"], "m4000"]}, "12000 layers, more than there are parameters"),
        ({"arch_layout": ["", ["T1"], "\x1b" * 5000]}, "not a valid H-Net"),
    ],
)
def test_configurations_of_absurd_size_are_refused_at_once(small, changes, message):
    config, params, _ = small
    with pytest.raises(LayoutError, match=message) as caught:
        from_reference({**config, **changes}, params)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= LONGEST
    deep: list = ["T1"]
    for _ in range(900):
        deep = ["m1", deep, "m1"]
    with pytest.raises(LayoutError, match="more than 32 stages"):
        shape_of({**config, "arch_layout": deep})


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub with a sharded model, and an empty cache."""
    sharded(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with hub("someone/words", files) as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield server


def test_shards_come_from_the_hub_and_later_from_the_cache(server, monkeypatch):
    from unet.files.pretrained import _fetched

    index = _fetched("someone/words")
    assert sorted(set(read_index(index).values())) == ["x-1.safetensors", "x-2.safetensors"]
    assert set(open_weights(index)) == set(ARRAYS)
    server.faults["HEAD"] = ["500"] * 100
    waits: list[float] = []
    assert Repository("someone/words", wait=waits.append).first([index.name]) == index
    assert tuple(waits) == WAITS


@pytest.mark.parametrize("status", ["500", "429"])
def test_a_hub_that_goes_on_refusing_is_given_up_in_a_stated_time(server, status):
    server.faults["HEAD"] = [status] * 100
    waits: list[float] = []
    with pytest.raises(LoadError, match=f"not cached and the hub cannot be reached .it answers {status}"):
        Repository("someone/words", wait=waits.append).first(["model.safetensors.index.json"])
    assert tuple(waits) == WAITS
    server.faults["HEAD"] = [status]
    assert Repository("someone/words", wait=waits.append).first(["x-1.safetensors"]).is_file()


@pytest.mark.parametrize("fault", ["no commit", "commit outside", "no tag", "tag outside"])
def test_answers_that_make_no_sense_are_refused_before_files_are_named_by_them(server, tmp_path, fault):
    server.faults["HEAD"] = [fault]
    with pytest.raises(LoadError, match="names no commit or no version of the file"):
        Repository("someone/words").first(["x-1.safetensors"])
    assert not (tmp_path / "cache").exists()


def test_names_that_lead_elsewhere_are_refused(server, tmp_path):
    for revision in ("../../x", "/etc", "a//b", "..", "a\nb"):
        with pytest.raises(LoadError, match="names a revision that is no branch"):
            Repository(f"someone/words@{revision}")
    for name in ("../x", "/etc/passwd", "..", "", "a/b", "a\\b", "c:x"):
        with pytest.raises(LoadError, match="no file beside the others"):
            Repository("someone/words").optional(name)
    server.files["model.safetensors.index.json"] = b'{"weight_map": {"a": "../../x.safetensors"}}'
    with pytest.raises(LoadError, match="no safetensors file beside it"):
        load_hnet("someone/words")
    assert not [request for request in server.requests if "x.safetensors" in request]
    assert Repository(f"someone/words@{COMMIT}").optional("none") is None
