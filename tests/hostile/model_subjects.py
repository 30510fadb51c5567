"""Files of models: this library's own, PyTorch's, published ones, and their configurations."""

from __future__ import annotations

import functools
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array

from estimators import Discount, EarlyExit, Estimator, RuleRouter, ScoreFunctionObjective
from estimators.routers.rules import whitespace
from estimators.vocabulary import Vocabulary
from tests.hostile.subject import Subject
from unet import Chunker, Projection, Select, Smooth
from unet.files.arrays import file_content
from unet.files.described import describe
from unet.files.errors import LayoutError, LoadError
from unet.files.json_files import read_json
from unet.files.published import shape_of
from unet.files.saving import load_module, metadata_of
from unet.files.torch_files import write_torch_file
from unet.files.weights import only_weights, open_weights

ARRAYS = {
    "embeddings.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "backbone.dt_bias": np.linspace(-1, 1, 5).astype(jnp.bfloat16),
    "lm_head.weight": np.ones((2, 1), np.float16),
}

CONFIGURATION = {
    "arch_layout": ["m2", ["T1m1", ["T2"], "m1T1"], "m2"],
    "d_model": [64, 64, 96],
    "d_intermediate": [0, 128, None],
    "vocab_size": 256,
    "ssm_cfg": {"chunk_size": 256, "d_conv": 4, "d_state": 16, "expand": 2},
    "attn_cfg": {"num_heads": [4, 4, 4], "rotary_emb_dim": [8, 8, 12], "window_size": [63, 63, -1]},
    "tie_embeddings": False,
}

SHARDS = {
    f"model-0000{number}-of-00002.safetensors": [*ARRAYS][part] for number, part in ((1, slice(0, 2)), (2, slice(2, 3)))
}
"""The names of shards and of the arrays in them."""


def _described(module: eqx.Module) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of a module, and its description."""
    arrays: dict[str, Array] = {}
    structure = json.dumps(describe(module, "model", arrays))
    return {name: np.asarray(array) for name, array in arrays.items()}, structure


@functools.cache
def _model() -> tuple[dict[str, np.ndarray], str]:
    """Of a module with all that a model has: nested modules, arrays, tuples, plain values and functions."""
    chunker = Chunker(Select(), Smooth(Projection(8)))
    objective = ScoreFunctionObjective((EarlyExit(), Discount(0.9)), target_rate=0.2)
    return _described(Estimator(RuleRouter(whitespace, 0), chunker, objective))


def _prepared() -> bytes:
    words = [bytes([value]) for value in range(256)] + [b"th", b"he"]
    return _file(*_described(Vocabulary(words, 0.3)))


def saved_files() -> Mapping[str, bytes]:
    """Files as the library writes them, by name: the same in every process."""
    return {"model.safetensors": _file(*_model()), "prepared.safetensors": _prepared()}


def _file(arrays: Mapping[str, np.ndarray], structure: str) -> bytes:
    """A file with checksums that fit."""
    return b"".join(file_content(arrays, metadata_of(structure, arrays)))


def _unchecked(arrays: Mapping[str, np.ndarray], structure: str) -> bytes:
    """A file of the version without checksums."""
    return b"".join(file_content(arrays, {"format": "caesura", "version": "3", "structure": structure}))


def _read_module(folder: Path, content: bytes) -> object:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    leaves, structure = jax.tree.flatten(load_module(path))
    return _comparable(dict(enumerate(map(np.asarray, leaves)))), structure


def _comparable(arrays: Mapping[str, np.ndarray] | Mapping[int, np.ndarray]) -> object:
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in arrays.items()}


def _parts() -> tuple[bytes, bytes]:
    """The header and the data of a model's file."""
    content = _file(*_model())
    start = 8 + int.from_bytes(content[:8], "little")
    return content[8:start], content[start:]


def _read_header(folder: Path, header: bytes) -> object:
    """A file with this header and the usual data."""
    return _read_module(folder, len(header).to_bytes(8, "little") + header + _parts()[1])


def _read_forged(folder: Path, structure: bytes) -> object:
    """A file with another description of the model, and checksums that fit it."""
    return _read_module(folder, _file(_model()[0], structure.decode(errors="replace")))


@functools.cache
def _members() -> Mapping[str, bytes]:
    """The members of PyTorch's file."""
    with TemporaryDirectory() as folder:
        write_torch_file(Path(folder) / "saved.pt", ARRAYS)
        with zipfile.ZipFile(Path(folder) / "saved.pt") as archive:
            return {name: archive.read(name) for name in archive.namelist()}


def _torch(members: Mapping[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return made.getvalue()


def _pickles() -> Sequence[bytes]:
    """The pickle of a state dict, and of a training checkpoint around one."""
    state = _members()["weights/data.pkl"]
    beside = pickle.dumps({"loss": np.float64(1.25), "steps": [1, 2**70], "names": {"a"}, (1, (2,)): None}, 2)
    model, other = (b"X" + len(key).to_bytes(4, "little") + key for key in (b"model", b"other"))
    return [state, b"\x80\x02}(" + model + state[2:-1] + other + beside[2:-1] + b"u."]


def _read_pickle(folder: Path, content: bytes) -> object:
    """A file of weights with this pickle."""
    return _read_weights("weights.pt")(folder, _torch({**_members(), "weights/data.pkl": content}))


def _read_weights(name: str) -> Callable[[Path, bytes], object]:
    def read(folder: Path, content: bytes) -> object:
        path = folder / name
        path.write_bytes(content)
        return _comparable(open_weights(path))

    return read


def _read_config(folder: Path, content: bytes) -> object:
    path = folder / "config.json"
    path.write_bytes(content)
    return shape_of(read_json(path))


def _read_index(folder: Path, content: bytes) -> object:
    for file, names in SHARDS.items():
        (folder / file).write_bytes(safetensors.numpy.save({name: ARRAYS[name] for name in names}))
    (folder / "model.safetensors.index.json").write_bytes(content)
    return _comparable(open_weights(only_weights(folder)))


def _published() -> bytes:
    return safetensors.numpy.save(ARRAYS)


def _configuration() -> bytes:
    return json.dumps(CONFIGURATION).encode()


def _index() -> bytes:
    places = {name: file for file, names in SHARDS.items() for name in names}
    return json.dumps({"metadata": {"total_size": 62}, "weight_map": places}).encode()


REFUSED = (LoadError,)

SUBJECTS: tuple[Subject, ...] = (
    Subject("model.safetensors", lambda _: [_file(*_model())], _read_module, REFUSED, checked=True),
    Subject("header of model.safetensors", lambda _: [_parts()[0]], _read_header, REFUSED, "json", checked=True),
    Subject("forged model.safetensors", lambda _: [_model()[1].encode()], _read_forged, REFUSED, "json"),
    Subject("model.safetensors without checksums", lambda _: [_unchecked(*_model())], _read_module, REFUSED),
    Subject("prepared.safetensors", lambda _: [_prepared()], _read_module, REFUSED, checked=True),
    Subject("weights.pt", lambda _: [_torch(_members())], _read_weights("weights.pt"), REFUSED, checked=True),
    Subject("pickle in weights.pt", lambda _: _pickles(), _read_pickle, REFUSED),
    Subject("published safetensors", lambda _: [_published()], _read_weights("weights.safetensors"), REFUSED),
    Subject("config.json of an H-Net", lambda _: [_configuration()], _read_config, (*REFUSED, LayoutError), "json"),
    Subject("index of shards", lambda _: [_index()], _read_index, REFUSED, "json"),
)
