"""Saving and loading models: one safetensors file holds the arrays and describes the model that they belong to.

The file's metadata describes the tree of modules: their classes, the values of their fields, and the name of each array. So any
composition of routers, chunkers, objectives and stages can be saved, and loaded without the code that configured it. Nothing in
a file is executed: it can name only classes and functions of this library, and those that the caller allows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from unet.model import UNet

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT = "caesura"
VERSION = "3"

_PACKAGES = ("estimators", "unet")
_PLAIN = (bool, int, float, str, type(None))

Known = type | Callable[..., object] | types.ModuleType
"""What a file may name beside this library's own: a class, a function, or a module with all classes of its package that are
imported already."""
Names = Sequence[Known] | Mapping[str, Known]
"""The same, or by the names that files have for them, such as `{"__main__.Mine": Mine}` for a class that has moved."""


class LoadError(Exception):
    """What is wrong with the files of a model, where, and what to do about it."""


@dataclass(frozen=True)
class Loaded:
    """A `model`, and the `config` of the run that trained it, for information (empty if there was no such file). The model does
    not depend on it."""

    model: UNet
    config: Mapping[str, object]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a crash leaves either the old one or the new one, never a partial one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def save(model: UNet, folder: str | Path) -> Path:
    """Write `model.safetensors` to `folder`, which is created if it is missing, and return its path. A crash leaves no partial
    file.

    Raises `ValueError` if a model contains anything but modules, arrays, plain values and named functions.
    """
    return save_module(model, Path(folder) / WEIGHTS)


def save_module(module: eqx.Module, path: Path) -> Path:
    """Write any module to a file of its own, as `save` writes a model."""
    arrays: dict[str, np.ndarray] = {}
    structure = _described(module, "model", arrays)
    metadata = {"format": FORMAT, "version": VERSION, "structure": json.dumps(structure, separators=(",", ":"))}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, safetensors.numpy.save(arrays, metadata))
    return path


def require_saveable(module: eqx.Module) -> None:
    """Raise `ValueError` where `save` would, without writing anything."""
    small = jax.tree.map(lambda leaf: jnp.zeros(()) if eqx.is_array(leaf) else leaf, module)
    _described(small, "model", {})


def load(where: str | Path, *, known: Names = ()) -> Loaded:
    """The model in the folder of a run or an export, in a `.safetensors` file, or in a repository of the hub (`hub:owner/name`,
    or `hub:owner/name@revision`).

    `known`: classes, functions and modules it uses beside those of this library; nothing is imported because a file names it.
    Raises `LoadError` if there is no model, if it is damaged, and if it names an unknown class.
    """
    folder = (
        download(str(where)[4:], [WEIGHTS], beside=[CONFIG]).parent if str(where).startswith("hub:") else Path(where)
    )
    path = folder if folder.suffix == ".safetensors" else folder / WEIGHTS
    if not path.is_file():
        raise LoadError(f"{folder} holds no {path.name}: it is neither a finished run nor an exported model")
    config = path.with_name(CONFIG)
    model = load_module(path, known)
    if not isinstance(model, UNet):
        raise LoadError(f"{path} describes a {type(model).__name__}, not a model")
    return Loaded(model, _json(config.read_text(), config) if config.is_file() else {})


def describes_itself(path: Path) -> bool:
    """Whether a file describes the model that its arrays belong to, as those of `save` do."""
    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def load_module(path: Path, known: Names = ()) -> object:  # of whatever class the file describes
    """What `save_module` wrote. Raises `LoadError` as `load` does."""
    names = _by_name(known)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or "structure" not in metadata:
                raise LoadError(f"{path} does not describe the model of its arrays: it was not written by this library")
            if metadata.get("version") != VERSION:
                raise LoadError(
                    f"{path} has format version {metadata.get('version')}; this version of the library reads {VERSION}"
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
        raise LoadError(f"{path} is damaged: its array {min(left)} belongs to nothing in the model")
    return model


def outside_classes(path: Path) -> list[str]:
    """The names of the classes in a file that are not part of this library; none for a file that is not of `save`."""
    if not describes_itself(path):
        return []
    with safe_open(path, framework="numpy") as file:
        text = (file.metadata() or {}).get("structure", "")
    return sorted({name for name in _CLASS.findall(text) if name.split(".")[0] not in _PACKAGES})


_CLASS = re.compile(r'"class":"([\w.]+)"')


def _by_name(known: Names) -> dict[str, Known]:
    """What is known by the names that files use; modules by theirs."""
    if isinstance(known, Mapping):
        return dict(known)
    return {
        one.__name__ if isinstance(one, types.ModuleType) else f"{one.__module__}.{one.__qualname__}": one
        for one in known
    }


def _described(value: object, name: str, arrays: dict[str, np.ndarray]) -> object:
    """`value` as JSON; its arrays are added to `arrays`, named by the path of their fields."""
    if eqx.is_array(value):
        # Not np.ascontiguousarray, which turns scalars into vectors.
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
    raise ValueError(f"{name} is a {type(value).__name__}, which cannot be saved")


def _built(
    described: object, array: Callable[[str], np.ndarray], known: Mapping[str, Known], path: Path
) -> object:  # whatever was described
    """The value that `_described` wrote as JSON."""
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
    raise LoadError(f"{path} is damaged: its description of the model is invalid at {str(described)[:60]}")


def _instance(kind: Known, values: Mapping[str, object], path: Path) -> object:  # of whatever class `kind` is
    assert isinstance(kind, type)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    lacking = [name for name, field in fields.items() if name not in values and field.default is dataclasses.MISSING]
    if lacking or not values.keys() <= fields.keys():
        differing = sorted({*lacking, *(values.keys() - fields.keys())})
        raise LoadError(f"{path} was written by another version: its {kind.__name__} differs in {', '.join(differing)}")
    # Not by calling the class, which would draw new weights.
    made = object.__new__(kind)
    for name, field in fields.items():
        object.__setattr__(made, name, values.get(name, field.default))
    return made


def _named(name: str, known: Mapping[str, Known], path: Path, *, function: bool) -> Known:
    """The class of modules or the function of that name, which must be of this library or `known`."""
    found: object = known.get(name)
    module, _, attribute = name.rpartition(".")
    packages = {one.__name__.split(".")[0] for one in known.values() if isinstance(one, types.ModuleType)}
    if found is None and module.split(".")[0] in packages and module in sys.modules:
        found = getattr(sys.modules[module], attribute, None)
        found = found if getattr(found, "__module__", None) == module else None
    if found is None and module.split(".")[0] in _PACKAGES:
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except ImportError:
            found = None
        # Not what a module only imports.
        found = found if getattr(found, "__module__", None) == module else None
    trusted = name in known or module.startswith("estimators") or module.split(".")[0] in packages
    if function and isinstance(found, types.FunctionType) and trusted:
        return found
    if not function and isinstance(found, type) and dataclasses.is_dataclass(found):
        return found
    raise LoadError(
        f"{path} was made with {name}, which is not part of this library: name its module with --plugin {module}, or pass the "
        f"{'function' if function else 'class'} to load(…, known=[…])"
    )


def _json(text: str, path: Path) -> dict[str, object]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise LoadError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise LoadError(f"{path} is damaged: it holds no JSON object")
    return content


def download(repository: str, wanted: Sequence[str], *, beside: Sequence[str]) -> Path:
    """Download the first of the files `wanted` that a model of the hub (`owner/name`, or `owner/name@revision`) has, and those
    `beside` it that exist, unless they are cached; returns the path of the first. Raises `LoadError` if there is none of them,
    or the hub cannot be reached."""
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
        raise LoadError(f"hub:{repository} is not the name of a repository of the hub ({error})") from None
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
