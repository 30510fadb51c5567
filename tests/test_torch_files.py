"""What PyTorch's files of weights may hold, and how much time and memory reading them takes."""

import pickle
import struct
import time
import tracemalloc
import zipfile
from collections import defaultdict

import numpy as np
import pytest

from tests.test_pretrained import Named, Storage, opcodes, tensor
from unet.files.pickles import IGNORED, MEMORY, PickleError, read_pickle
from unet.files.torch_files import MAX_PICKLE_BYTES, TorchFile, TorchFileError

VALUES = np.arange(6, dtype=np.float32)


def zipped(path, content, *, members=(), method=zipfile.ZIP_STORED, data=None):
    """A file with the pickle `content`, of opcodes, and other `members`, which are written by `method`."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x04" + content + b".")
        archive.writestr("archive/data/0", VALUES.tobytes() if data is None else data)
        for name, value in members:
            archive.writestr(name, value, method)
    return path


def read(content: bytes) -> object:
    """The value of a pickle that names nothing."""
    return read_pickle(b"\x80\x04" + content + b".", {}, lambda identifier: identifier)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_read_as_they_were_written(protocol):
    for value in (
        {"a": 1, "b": 2.5, "c": None, "d": True, 7: "x", "e": {"f": ()}},
        ((), ("b",), ("c", 1), (1, 2, 3), (1, 2, 3, 4), 2**63 - 1, -(2**63)),
    ):
        assert read_pickle(pickle.dumps(value, protocol), {}, id) == value
    content = {"a": [1, 2], "b": 2**63, "c": 2**80, (1, 2): 3}
    assert read_pickle(pickle.dumps(content, protocol), {}, id) == {**dict.fromkeys("abc", IGNORED), IGNORED: 3}


def test_sets_and_bytes_are_left_out():
    content = {"a": {3}, "b": b"4", "c": frozenset("5"), "d": bytearray(b"6")}
    assert read_pickle(pickle.dumps(content, 5), {}, id) == dict.fromkeys("abcd", IGNORED)


DOUBLED = b")" + b"2\x86" * 60
DEEP = b")" + b"\x85" * 50_000


@pytest.mark.parametrize(
    "content",
    [
        b"}" + DEEP + b"Ns",
        b"}" + DOUBLED + b"Ns",
        b"\x8f(" + DOUBLED + b"\x90",
        b"(" + DOUBLED + b"\x91",
        DEEP,
        b"}" * 50_000,
    ],
    ids=["deep key", "doubled key", "doubled in a set", "doubled in a frozen set", "deep", "many dictionaries"],
)
def test_what_is_nested_deep_or_doubled_is_never_walked_through(content):
    start = time.process_time()
    read(content)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"i__main__\nx\n", "the opcode INST"),
        (b"(cos\nsystem\no", "names os.system"),
        (b"\x8c\x02os\x8c\x06system\x93", "names os.system"),
        (DOUBLED + b"\x8c\x01x\x93", "a name is no text"),
        (b"NN\x81", "calls what is no function"),
        (b"NNR", "calls what is no function"),
        (b"\x82\x01", "the opcode EXT1"),
        (b"\x97", "the opcode NEXT_BUFFER"),
        (b"h\x05", "refers to what it does not have"),
        (b"\x85", "a tuple lacks parts"),
        (b"t", "damaged"),
        (b"K", "damaged"),
        (b"\x8b\xff\xff\xff\x7f", "damaged"),
        (b"I" + b"9" * 5000 + b"\n", "damaged"),
        (b"c\x1b[31m\nx\n", r"names \\x1b\[31m\.x"),
    ],
)
def test_damage_and_other_opcodes_are_said(content, message):
    with pytest.raises(PickleError, match=message) as caught:
        read(content)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "opcode",
    [
        b"}",
        b"}\x94",
        b"\x8f",
        b"\x94",
        b"(",
        b")\x85",
        b"}K\x00Ns",
        b"\x8c\x04\xf0\x9f\x98\x80",
        b"\x8a\x07" + b"\x7f" * 7,
        b"2",
    ],
    ids=["dict", "remembered dict", "set", "memo", "mark", "tuple", "full dict", "text", "integer", "again"],
)
def test_memory_is_bounded_by_the_size_of_the_pickle(opcode):
    content = b"N" + opcode * (6_000 // len(opcode))
    tracemalloc.start()
    read(content + b"N")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY * len(content) + 200_000


def test_functions_that_copy_their_argument_are_not_called(tmp_path):
    """`list` of a megabyte of bytes takes eight, each time."""
    content = b"B" + struct.pack("<I", 1 << 20) + bytes(1 << 20) + b"\x940" + b"cbuiltins\nlist\nh\x00\x85R" * 100
    tracemalloc.start()
    with pytest.raises(TorchFileError, match="holds no dictionary of tensors"):
        TorchFile(zipped(tmp_path / "w.pt", content))
    assert tracemalloc.get_traced_memory()[1] < 6 << 20
    tracemalloc.stop()


def test_shapes_of_very_large_integers_are_not_multiplied(tmp_path):
    large = b"\x8b" + struct.pack("<I", 200_000) + b"\x7f" * 200_000
    usual = opcodes((2, 3))
    content = opcodes({"a": tensor()})
    assert usual in content
    for shape in (b"(" + large * 8 + b"t", b"(" + b"K\x01" * 100_000 + b"t"):
        with pytest.raises(TorchFileError, match="no sensible shape"):
            TorchFile(zipped(tmp_path / "w.pt", content.replace(usual, shape)))


@pytest.mark.parametrize("name", ["archive/byteorder", "archive/data.pkl"])
def test_compressed_members_are_refused_before_they_are_read(tmp_path, name):
    content = b"little" + bytes(1 << 24)
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        for member in ("archive/data.pkl", "archive/byteorder"):
            archive.writestr(member, content, zipfile.ZIP_DEFLATED if member == name else zipfile.ZIP_STORED)
    tracemalloc.start()
    with pytest.raises(TorchFileError, match=r"compressed|data\.pkl of over"):
        TorchFile(tmp_path / "w.pt")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    with pytest.raises(TorchFileError, match="byteorder is compressed"):
        TorchFile(
            zipped(tmp_path / "w.pt", b"}", members=[("archive/byteorder", content)], method=zipfile.ZIP_DEFLATED)
        )


def test_a_pickle_of_more_than_weights_need_is_refused(tmp_path):
    with pytest.raises(TorchFileError, match=f"over {MAX_PICKLE_BYTES} bytes"):
        TorchFile(zipped(tmp_path / "w.pt", bytes(MAX_PICKLE_BYTES)))


def test_tensors_that_share_their_data_are_not_larger_than_the_file_twice(tmp_path):
    data = bytes(1 << 16)

    def shared(count):
        tensors = {f"t{n}": tensor(size=1 << 14, shape=(1 << 14,), strides=(1,)) for n in range(count)}
        return zipped(tmp_path / "w.pt", opcodes(tensors), data=data)

    assert len(TorchFile(shared(2))) == 2
    with pytest.raises(TorchFileError, match="its tensors together are 524288 bytes, much more than the file"):
        TorchFile(shared(8))


def test_one_changed_bit_of_the_data_is_noticed(tmp_path):
    path = zipped(tmp_path / "w.pt", opcodes({"a": tensor(), "b": tensor(offset=3, shape=(3,), strides=(1,))}))
    np.testing.assert_array_equal(TorchFile(path)["b"], VALUES[3:])
    content = path.read_bytes()
    at = content.index(VALUES.tobytes())
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(TorchFileError, match="the data of b does not have its checksum"):
        TorchFile(path)["b"]


def test_a_training_checkpoint_has_numbers_and_settings_beside_the_weights(tmp_path):
    """As loops save them: NumPy's numbers, settings, an optimiser's state by number, another tensor."""
    settings = Named("argparse", "Namespace", ())
    content = {
        "model": {"a": tensor(), "_extra": None},
        "best": np.float64(1.25),
        "rate": np.float32(0.5),
        "names": {"a", "b"},
        "lists": defaultdict(list),
        "bytes": b"12",
        "random": np.random.default_rng(0).standard_normal(3),
        "settings": settings,
        "optimizer": {"state": {0: {"exp_avg": tensor()}}, "param_groups": [{"lr": 0.1}]},
        "loss": tensor(shape=(), strides=()),
        "big": 2**100,
    }
    read = TorchFile(zipped(tmp_path / "w.pt", opcodes(content)))
    assert list(read) == ["a"]
    np.testing.assert_array_equal(read["a"], VALUES.reshape(2, 3))
    with pytest.raises(TorchFileError, match=r"several dictionaries of tensors \(state_dict, model\)"):
        TorchFile(zipped(tmp_path / "w.pt", opcodes({**content, "state_dict": {"b": tensor()}})))


@pytest.mark.parametrize("field", ["size", "offset", "count"])
def test_a_directory_that_leads_elsewhere_is_refused(tmp_path, field):
    """Its entries and its end have sizes and offsets of their own."""
    path = zipped(tmp_path / "w.pt", opcodes({"a": tensor()}))
    content = bytearray(path.read_bytes())
    end = content.rindex(b"PK\5\6")
    entry = content.index(b"PK\1\2", content.index(b"PK\1\2") + 4)
    at = {"size": entry + 20, "offset": entry + 42, "count": end + 16}[field]
    struct.pack_into("<I", content, at, 0x7FFFFFF0)
    path.write_bytes(content)
    with pytest.raises(TorchFileError, match="damaged"):
        TorchFile(path)["a"]


def test_names_and_storages_of_other_kinds_are_refused(tmp_path):
    for pid in [("storage", 1, "0", "cpu", 6), ("storage",), (Named("torch", "FloatStorage"),) * 5]:
        storage = Storage("FloatStorage", "0", 6)
        storage.pid = pid
        content = Named("torch._utils", "_rebuild_tensor_v2", storage, 0, (6,), (1,), False, {})
        with pytest.raises(TorchFileError, match="not a storage"):
            TorchFile(zipped(tmp_path / "w.pt", opcodes({"a": content})))
    with pytest.raises(TorchFileError, match="no sensible shape"):
        TorchFile(zipped(tmp_path / "w.pt", opcodes({"a": Named("torch._utils", "_rebuild_tensor_v2", 1)})))
    with pytest.raises(TorchFileError, match="has no tensor"):
        TorchFile(zipped(tmp_path / "w.pt", opcodes({"a": Named("torch._utils", "_rebuild_parameter", 1)})))
