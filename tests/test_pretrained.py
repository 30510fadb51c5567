"""Published checkpoints: files of PyTorch without PyTorch, what they may not hold, and models from files and from a hub."""

import io
import itertools
import json
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict

import equinox as eqx
import huggingface_hub.constants
import jax.numpy as jnp
import numpy as np
import pytest

from tests.hub_server import hub
from unet import LoadError, load_hnet, save_hnet
from unet.files.hnet_layout import from_reference
from unet.files.pretrained import PUBLISHED
from unet.files.torch_files import TorchFile, TorchFileError, write_torch_file


@pytest.fixture(scope="module")
def small(golden):
    z = golden("hnet_1stage")
    config = json.loads(str(z["config"]))
    params = {key[6:]: z[key] for key in z.files if key.startswith("param.")}
    return config, params, from_reference(config, params)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((3, 4), dtype=np.float32),
        "b": rng.standard_normal(5).astype(jnp.bfloat16),
        "c": rng.standard_normal((2, 1, 3)).astype(np.float16),
        "one": np.float64(3.5) * np.ones(()),
        "whole": np.arange(300, dtype=np.int64),
    }


def test_tensors_come_back_as_they_were_written(tmp_path, tensors):
    write_torch_file(tmp_path / "w.pt", tensors)
    read = TorchFile(tmp_path / "w.pt")
    assert list(read) == list(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(read[name], value, strict=True)
        assert read.places()[name].shape == value.shape
    with pytest.raises(ValueError, match="complex64, which PyTorch has no storage for"):
        write_torch_file(tmp_path / "w.pt", {"z": np.zeros(2, np.complex64)})


class Named:
    """Pickles as a call of something in a module that need not be there."""

    def __init__(self, module, name, *arguments):
        self.where, self.arguments = (module, name), arguments


class Storage:
    def __init__(self, kind, member, size):
        self.pid: tuple = ("storage", Named("torch", kind), member, "cpu", size)


class Changed:
    """Something that is changed after it was made, as BUILD does."""

    def __init__(self, made, state):
        self.made, self.state = made, state


def opcodes(value):
    """A pickle of plain values, `Named` calls and storages, whose classes nobody has to have."""
    if isinstance(value, Storage):
        return opcodes(value.pid) + b"Q"
    if isinstance(value, Named):
        call = opcodes(value.arguments) + b"R" if value.arguments else b""
        return f"c{value.where[0]}\n{value.where[1]}\n".encode() + call
    if isinstance(value, Changed):
        return opcodes(value.made) + opcodes(value.state) + b"b"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(opcodes, value)) + b"t"
    if isinstance(value, dict):
        return b"}(" + b"".join(opcodes(part) for pair in value.items() for part in pair) + b"u"
    # Without the two opcodes of the protocol and the one that ends it.
    return pickle.dumps(value, 2)[2:-1]


def tensor(kind="FloatStorage", member="0", size=6, offset=0, shape=(2, 3), strides=(3, 1)):
    arguments = (Storage(kind, member, size), offset, shape, strides, False, {})
    return Named("torch._utils", "_rebuild_tensor_v2", *arguments)


def torch_file(path, content, count=6):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + opcodes(content) + b".")
        archive.writestr("archive/data/0", np.arange(count, dtype=np.float32).tobytes())
    return path


def test_views_parameters_and_the_settings_beside_them_are_read(tmp_path):
    settings = Named("omegaconf.listconfig", "ListConfig", (1.0, 2.0))
    state = {"_optim": settings}
    content = {
        "turned": tensor(shape=(3, 2), strides=(1, 3)),
        "part": tensor(offset=2, shape=(2,), strides=(2,)),
        "parameter": Named("torch._utils", "_rebuild_parameter", tensor(), True, {}),
        "with settings": Named("torch._utils", "_rebuild_parameter_with_state", tensor(), True, {}, state),
        "step": 7,
    }
    read = TorchFile(torch_file(tmp_path / "w.pt", {"state_dict": content, "epoch": 3}))
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert set(read) == set(content) - {"step"}
    np.testing.assert_array_equal(read["turned"], numbers.T)
    np.testing.assert_array_equal(read["part"], [2, 4])
    np.testing.assert_array_equal(read["parameter"], numbers)
    np.testing.assert_array_equal(read["with settings"], numbers)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": Named("os", "system", "touch /tmp/never")}, "names os.system"),
        ({"a": Named("builtins", "eval", "1")}, "names builtins.eval"),
        ({"a": Named("torch.nn.modules.linear", "Linear", ())}, "names torch.nn.modules.linear.Linear"),
        ({"a": Named("collections", "OrderedDict.fromkeys", ())}, "names collections.OrderedDict.fromkeys"),
        ({"a": tensor(kind="QUInt8Storage")}, "names torch.QUInt8Storage"),
        ({"a": tensor(offset=1)}, "reaches beyond its storage"),
        ({"a": tensor(strides=(1 << 40, 1))}, "reaches beyond its storage"),
        ({"a": tensor(strides=(-1, 1))}, "no sensible shape"),
        ({"a": tensor(shape=(2,))}, "no sensible shape"),
        ({"a": tensor(shape=(1,) * 17, strides=(1,) * 17)}, "no sensible shape"),
        ({"a": tensor(shape=(4, 2), strides=(0, 0))}, "more elements than its storage"),
        ({"a": tensor(shape=(0, 1 << 62), strides=(0, 0))}, "more elements than its storage"),
        ({"a": tensor(size=1 << 45)}, "a needs 140737488355328 bytes of data and has 24"),
        ({"a": 3}, "holds no dictionary of tensors"),
        ([1, 2], "holds no dictionary of tensors"),
    ],
    ids=itertools.count(),
)
def test_anything_but_sensible_tensors_is_refused_by_name(tmp_path, content, message):
    with pytest.raises(TorchFileError, match=message):
        TorchFile(torch_file(tmp_path / "w.pt", content))


def test_a_plain_pickle_a_cut_file_and_missing_numbers_are_refused(tmp_path, tensors):
    path = tmp_path / "w.pt"
    path.write_bytes(pickle.dumps(OrderedDict(a=1)))
    with pytest.raises(TorchFileError, match="not a zip file"):
        TorchFile(path)
    write_torch_file(path, tensors)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TorchFileError, match="not a zip file"):
        TorchFile(path)
    with pytest.raises(TorchFileError, match="a needs 24 bytes of data and has 12"):
        TorchFile(torch_file(path, {"a": tensor()}, 3))
    with pytest.raises(TorchFileError, match="lacks the data of a"):
        TorchFile(torch_file(path, {"a": tensor(member="5")}))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(TorchFileError, match=r"no data\.pkl"):
        TorchFile(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02garbage")
    with pytest.raises(TorchFileError, match=r"cannot be read|refused"):
        TorchFile(path)


def test_nothing_that_was_checked_is_changed_afterwards(tmp_path):
    changed = Changed(tensor(), {"strides": (1000, 1), "shape": (64, 1)})
    storage = Changed(Named("torch", "FloatStorage"), {"name": "other"})
    read = TorchFile(torch_file(tmp_path / "w.pt", {"a": changed, "b": tensor(), "c": storage}))
    assert read.places()["a"] == read.places()["b"]
    np.testing.assert_array_equal(read["a"], np.arange(6, dtype=np.float32).reshape(2, 3))
    assert read["b"].dtype == np.float32


def test_small_files_take_little_memory(tmp_path):
    """Numbers of places in a pickle, and sizes of buffers, may be anything."""
    for code in (b"}r\xff\xff\xff\xff.", b"\x96" + (1 << 40).to_bytes(8, "little") + b"."):
        with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
            archive.writestr("a/data.pkl", b"\x80\x05" + code)
        tracemalloc.start()
        with pytest.raises(TorchFileError):
            TorchFile(tmp_path / "w.pt")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("method", "flag", "order"), [(zipfile.ZIP_DEFLATED, 0, b"little"), (0, 1, b"little"), (0, 0, b"big")]
)
def test_numbers_lie_in_a_file_as_they_are(tmp_path, method, flag, order):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + opcodes({"a": tensor()}) + b".")
        archive.writestr("archive/data/0", np.arange(6, dtype=np.float32).tobytes())
        archive.writestr("archive/byteorder", order)
        archive.getinfo("archive/data/0").flag_bits |= flag
    with pytest.raises(TorchFileError, match=r"compressed or encrypted|big-endian"):
        TorchFile(path)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_written_in_the_released_layout_loads_again(tmp_path, small, kind, dtype):
    config, params, _ = small
    model = from_reference(config, params, dtype=dtype)
    path = save_hnet(model, tmp_path, name="mine", kind=kind)
    assert eqx.tree_equal(load_hnet(path, dtype=dtype), model)
    assert eqx.tree_equal(load_hnet(tmp_path, dtype=dtype), model)
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(["mine.json", path.name])


def test_files_that_make_no_model_are_refused_in_a_sentence(tmp_path, small):
    config, _, model = small
    path = save_hnet(model, tmp_path, kind="pt")
    with pytest.raises(LoadError, match="is not a file, nor the name"):
        load_hnet(tmp_path / "none.pt")
    with pytest.raises(LoadError, match="must hold one file of weights"):
        load_hnet(tmp_path.parent / tmp_path.name / "..")
    (tmp_path / "model.json").write_text("[]")
    with pytest.raises(LoadError, match="holds no JSON object"):
        load_hnet(path)
    (tmp_path / "model.json").write_text(json.dumps({**config, "d_model": [64, 128]}))
    with pytest.raises(LoadError, match=r"model.pt: backbone.main_network.pad_dimension has shape \[32\]"):
        load_hnet(path)
    (tmp_path / "model.json").unlink()
    with pytest.raises(LoadError, match="no configuration beside it"):
        load_hnet(path)
    (tmp_path / "own.json").write_text(json.dumps(config))
    assert eqx.tree_equal(load_hnet(path, config=tmp_path / "own.json"), model)
    safe = tmp_path / "model.safetensors"
    safe.write_bytes(b"nothing")
    with pytest.raises(LoadError, match="is damaged"):
        load_hnet(safe, config=tmp_path / "own.json")
    path.write_bytes(b"nothing")
    with pytest.raises(LoadError, match="not a zip file"):
        load_hnet(path, config=tmp_path / "own.json")


def test_a_model_comes_from_the_hub_by_its_name(tmp_path, small, monkeypatch):
    _, _, model = small
    path = save_hnet(model, tmp_path, name="hnet_small")
    files = {one.name: one.read_bytes() for one in (path, path.with_suffix(".json"))}
    with hub("someone/hnet_small", files) as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        assert eqx.tree_equal(load_hnet("someone/hnet_small"), model)
        with pytest.raises(LoadError, match=r"hub:someone/other has no other\.safetensors or"):
            load_hnet("someone/other")


def test_published_configurations_need_no_file(tmp_path, small):
    _, params, _ = small
    path = tmp_path / "hnet_1stage_L.pt"
    write_torch_file(path, params)
    with pytest.raises(LoadError, match=r"hnet_1stage_L.pt: parameters do not fit the configuration: \d+ missing"):
        load_hnet(path)
    assert PUBLISHED["hnet_2stage_XL"]["d_model"] == [1024, 1536, 2048]


def test_nothing_is_read_before_it_is_asked_for(tmp_path, tensors):
    path = tmp_path / "w.pt"
    write_torch_file(path, tensors)
    content = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(content) as archive:
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        # The same tensors give the same bytes, at any time.
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    read = TorchFile(path)
    assert "whole" in read
    assert len(read) == len(tensors)
