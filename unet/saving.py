"""Models as files: one safetensors file holds the arrays and says how they make up a model.

Beside the arrays, the file's metadata describes the tree of modules: their classes, what is in their fields, and the name of
each array. Any composition of routers, chunkers, objectives and stages can be kept so, and is built again without the code
that configured it. Nothing in a file is executed: it can name only classes and rules of this library, and those it is read
with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from unet.model import UNet

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT = "caesura"
VERSION = "2"

_PACKAGES = ("estimators", "unet")
_PLAIN = (bool, int, float, str, type(None))

Known = type | Callable[..., object]
"""A class of modules or a rule that a file may name beside those of this library."""


class LoadError(Exception):
    """What is wrong with the files of a model, where, and what to do about it."""


@dataclass(frozen=True)
class Loaded:
    """A `model`, and the `config` that lay beside it: what trained it, for people and programs to read (empty where there was
    none). The model does not depend on it."""

    model: UNet
    config: Mapping[str, object]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a crash leaves either the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def save(model: UNet, folder: Path) -> Path:
    """Write `model.safetensors` to `folder`, whole or not at all, and return its path.

    Raises `ValueError` for a model with anything in it but modules, arrays, plain values and functions that have a name.
    """
    arrays: dict[str, np.ndarray] = {}
    structure = _described(model, "model", arrays)
    metadata = {"format": FORMAT, "version": VERSION, "structure": json.dumps(structure, separators=(",", ":"))}
    write_atomically(folder / WEIGHTS, safetensors.numpy.save(arrays, metadata))
    return folder / WEIGHTS


def load(where: str | Path, *, known: Sequence[Known] = ()) -> Loaded:
    """The model in a folder that a run or an export left, in a `.safetensors` file, or in a repository of the hub
    (`hub:owner/name`, or `hub:owner/name@revision`).

    `known`: classes and rules beside those of this library that it is made of. Raises `LoadError` where there is none, where
    it is damaged, and where it names a class that is not known.
    """
    folder = (
        download(str(where)[4:], [WEIGHTS], beside=[CONFIG]).parent if str(where).startswith("hub:") else Path(where)
    )
    path = folder if folder.suffix == ".safetensors" else folder / WEIGHTS
    if not path.is_file():
        raise LoadError(f"{folder} holds no {path.name}: it is no finished run, nor an exported model")
    config = path.with_name(CONFIG)
    return Loaded(_read(path, known), _json(config.read_text(), config) if config.is_file() else {})


def describes_itself(path: Path) -> bool:
    """Whether a file says what model its arrays make up, as those of `save` do."""
    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def _read(path: Path, known: Sequence[Known]) -> UNet:
    names = {f"{one.__module__}.{one.__qualname__}": one for one in known}
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or "structure" not in metadata:
                raise LoadError(
                    f"{path} does not say what model its arrays make up: it was not written by this library"
                )
            if metadata.get("version") != VERSION:
                raise LoadError(
                    f"{path} has format {metadata.get('version')}; this version of the library reads {VERSION}"
                )
            structure, left = _json(metadata["structure"], path), set(file.keys())

            def array(name: str) -> np.ndarray:
                if name not in left:
                    raise LoadError(f"{path} is damaged: the array {name} is missing, or named twice")
                left.discard(name)
                return file.get_tensor(name)

            model = _built(structure, array, names, path)
    except SafetensorError as error:
        raise LoadError(f"{path} is damaged ({error})") from None
    if left:
        raise LoadError(f"{path} is damaged: nothing in the model takes its array {min(left)}")
    if not isinstance(model, UNet):
        raise LoadError(f"{path} describes a {type(model).__name__}, not a model")
    return model


def _described(value: object, name: str, arrays: dict[str, np.ndarray]) -> object:
    """`value` as JSON; its arrays go to `arrays`, by the path of fields that leads to them."""
    if eqx.is_array(value):
        # Not np.ascontiguousarray, which makes vectors of numbers.
        arrays[name] = np.asarray(value, order="C")
        return {"array": name}
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_described(part, f"{name}.{place}", arrays) for place, part in enumerate(value)]}
    if isinstance(value, types.FunctionType) and "<" not in value.__qualname__:
        return {"function": f"{value.__module__}.{value.__qualname__}"}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind, fields = type(value), [field.name for field in dataclasses.fields(value)]
        inside = {field: _described(getattr(value, field), f"{name}.{field}", arrays) for field in fields}
        return {"class": f"{kind.__module__}.{kind.__qualname__}", "fields": inside}
    raise ValueError(f"{name} is a {type(value).__name__}, of which no file can be made")


def _built(
    described: object, array: Callable[[str], np.ndarray], known: Mapping[str, Known], path: Path
) -> object:  # whatever was described
    """The value that `_described` made JSON of."""
    if isinstance(described, _PLAIN):
        return described
    if isinstance(described, dict):
        kind = next(iter(described), None)
        content = described.get(kind) if kind else None
        if kind == "array" and isinstance(content, str):
            return jnp.asarray(array(content))
        if kind == "tuple" and isinstance(content, list):
            return tuple(_built(part, array, known, path) for part in content)
        if kind == "function" and isinstance(content, str):
            return _named(content, known, path, function=True)
        inside = described.get("fields")
        if kind == "class" and isinstance(content, str) and isinstance(inside, dict):
            fields = {name: _built(part, array, known, path) for name, part in inside.items()}
            return _instance(_named(content, known, path, function=False), fields, path)
    raise LoadError(f"{path} is damaged: its description of the model makes no sense at {str(described)[:60]}")


def _instance(kind: Known, values: Mapping[str, object], path: Path) -> object:  # of whatever class `kind` is
    assert isinstance(kind, type)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    lacking = [name for name, field in fields.items() if name not in values and field.default is dataclasses.MISSING]
    if lacking or not values.keys() <= fields.keys():
        differing = sorted({*lacking, *(values.keys() - fields.keys())})
        raise LoadError(f"{path} was written by another version: its {kind.__name__} differs in {', '.join(differing)}")
    # Not the class itself, which would draw new weights.
    made = object.__new__(kind)
    for name, field in fields.items():
        object.__setattr__(made, name, values.get(name, field.default))
    return made


def _named(name: str, known: Mapping[str, Known], path: Path, *, function: bool) -> Known:
    """The class of modules or the rule of that name, which must be ours or `known`."""
    found: object = known.get(name)
    module, _, attribute = name.rpartition(".")
    if found is None and module.split(".")[0] in _PACKAGES:
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except ImportError:
            found = None
        # What a module merely imports is not its own.
        found = found if getattr(found, "__module__", None) == module else None
    if function and isinstance(found, types.FunctionType) and (name in known or module.startswith("estimators")):
        return found
    if not function and isinstance(found, type) and dataclasses.is_dataclass(found):
        return found
    raise LoadError(f"{path} was made with {name}, which is not part of this library: hand it to load(…, known=[…])")


def _json(text: str, path: Path) -> dict[str, object]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise LoadError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise LoadError(f"{path} is damaged: it holds no JSON object")
    return content


def download(repository: str, wanted: Sequence[str], *, beside: Sequence[str]) -> Path:
    """The first of the files `wanted` that a model of the hub (`owner/name`, or `owner/name@revision`) has, and those `beside`
    it that it has; fetched where they are not cached. Raises `LoadError` where it has none of them, or cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
    )

    fetch = HfApi().hf_hub_download
    name, _, revision = repository.partition("@")

    def first() -> Path:
        for place, file in enumerate(wanted):
            try:
                return Path(fetch(name, file, revision=revision or None))
            except RemoteEntryNotFoundError:
                if place + 1 == len(wanted):
                    raise
        raise ValueError("no file is wanted")

    try:
        found = first()
        for file in beside:
            with contextlib.suppress(RemoteEntryNotFoundError):
                fetch(name, file, revision=revision or None)
    except HFValidationError as error:
        raise LoadError(f"hub:{repository} names no repository of the hub ({error})") from None
    except LocalEntryNotFoundError as error:
        raise LoadError(
            f"hub:{repository} is not cached and the hub cannot be reached ({_first_line(error)})"
        ) from None
    except (EntryNotFoundError, HfHubHTTPError) as error:
        names = " or ".join(wanted)
        raise LoadError(f"hub:{repository} has no {names} for you on the hub ({_first_line(error)})") from None
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
