"""Code of others: which of it a command may use, and models that hold their classes.

A module is imported because the command line names it (`--plugin`, or a part as `package.module:Class`), or because an installed
package announces it. It is never imported because a file names it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
import types
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import equinox as eqx
import jax
import numpy as np

from estimators.lookup import PartError, imported
from experiments.config.errors import ConfigError, refused
from experiments.config.parts import KINDS
from experiments.config.settings import RunConfig
from unet import UNet
from unet.files.saving import WEIGHTS, Loaded, load, outside_classes
from unet.language_model import AbstractLanguageModel


def import_plugins(names: Sequence[str]) -> tuple[types.ModuleType, ...]:
    """The modules that `--plugin` names. Raises `ConfigError` for one that does not exist, or that fails, with its own error."""
    try:
        return tuple(imported("--plugin", name, name) for name in names)
    except PartError as error:
        raise refused(error) from error.__cause__


def announced(needed: Sequence[str]) -> tuple[types.ModuleType, ...]:
    """Of the modules that installed packages announce as parts, those of the packages `needed`."""
    points = [point for kind in KINDS for point in importlib.metadata.entry_points(group=kind.group)] if needed else []
    packages = {name.partition(".")[0] for name in needed}
    names = {point.value.partition(":")[0] for point in points}
    return import_plugins(sorted(name for name in names if name.partition(".")[0] in packages))


def named_modules(arguments: Sequence[str]) -> tuple[str, ...]:
    """The modules that a command line names: behind `--plugin`, and of classes as `package.module:Class`."""
    named = [match for word in arguments if (match := _CLASS.fullmatch(word.rpartition("=")[2]))]
    return (*plugins_in(arguments), *(match["module"] for match in named if match["module"] != "hub"))


def plugins_in(arguments: Sequence[str]) -> tuple[str, ...]:
    """The modules behind `--plugin` on a command line."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--plugin", nargs="*", action="extend", default=[])
    return tuple(early.parse_known_args(arguments)[0].plugin)


_CLASS = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):[^\W\d]\w*")


def modules_of(config: RunConfig) -> tuple[types.ModuleType, ...]:
    """The modules of the parts of a run that are not this library's own."""
    parts = [part for part in config.chosen if part.name not in part.kind.house]
    return tuple({sys.modules[part.cls.__module__]: None for part in parts})


def trusted(config: RunConfig) -> tuple[str, ...]:
    """The modules that a run's own file may name, since whoever asked for the run named them or its parts."""
    named = [part.name.partition(":")[0] for part in config.chosen if ":" in part.name]
    return tuple(dict.fromkeys([*config.plugin, *named, *(module.__name__ for module in modules_of(config))]))


def load_model(where: str | Path, plugins: Sequence[types.ModuleType] = ()) -> Loaded:
    """`unet.load`, with the classes of `plugins` and, where the model needs others, of installed packages.

    Raises `ConfigError` for a model of other classes, and for one whose weights are not numbers.
    """
    needed = outside_modules(where)
    known = [*plugins, *announced(needed)]
    # A package that is installed for this, or that the command line names, is trusted with all of its modules.
    packages = {module.__name__.partition(".")[0] for module in known}
    known += import_plugins([name for name in needed if name.partition(".")[0] in packages])
    lacking = [name for name in needed if name.partition(".")[0] not in packages]
    if lacking:
        raise ConfigError(
            f"{where} was made with classes of {', '.join(lacking)}, which are not part of this library: add --plugin "
            f"{' '.join(lacking)} if you trust them"
        )
    loaded = load(where, known=known)
    require_numbers(loaded.model, str(where))
    return loaded


def require_numbers(model: AbstractLanguageModel, where: str) -> None:
    """Raise `ConfigError` where weights are infinite or NaN: such a model has nothing to say."""
    arrays = jax.tree_util.tree_leaves_with_path(eqx.filter(model, eqx.is_inexact_array))
    wrong = [jax.tree_util.keystr(path) for path, leaf in arrays if not np.isfinite(np.asarray(leaf)).all()]
    if wrong:
        raise ConfigError(
            f"{where} holds weights that are not numbers, in {len(wrong)} of {len(arrays)} arrays such as {wrong[0]}: its "
            "training diverged, or the file was damaged; name another model"
        )


def require_bytes(model: AbstractLanguageModel, where: str | Path) -> UNet:
    """The model, if it reads bytes. Raises `ConfigError` for one that reads tokens."""
    if not isinstance(model, UNet):
        raise ConfigError(f"{where} holds a model of tokens, and this needs one that reads bytes: name another model")
    return model


def outside_modules(where: str | Path) -> list[str]:
    """The modules that a model's classes lie in and that are not this library's."""
    path = Path(where)
    path = path if path.suffix == ".safetensors" else path / WEIGHTS
    names = [] if str(where).startswith("hub:") or not path.is_file() else outside_classes(path)
    return sorted({name.rpartition(".")[0] for name in names})


def require_known(values: Mapping[str, object], plugins: Collection[str], where: str) -> None:
    """Raise `ConfigError` where the configuration in a file names a class as `package.module:Class` whose module the command line
    does not name."""
    for name in _names_in(values):
        module = name.partition(":")[0]
        if ":" in name and module not in plugins and not any(module.startswith(f"{one}.") for one in plugins):
            raise ConfigError(
                f"{where} was made with {name}, which is not part of this library: add --plugin {module} if you trust it"
            )


def _names_in(values: Mapping[str, object]) -> list[str]:
    """Every string that may name a part: of the fields that do, and in the lists among the settings."""
    found: list[object] = [values.get(name) for name in ("estimator", "chunker", "pool")]
    listed = [values.get(name) for name in ("inner_estimators", "constrain", "inner_constrain")]
    settings = values.get("settings")
    for section in settings.values() if isinstance(settings, dict) else ():
        listed += list(section.values()) if isinstance(section, dict) else []
    found += [one for several in listed if isinstance(several, list | tuple) for one in several]
    return [one for one in found if isinstance(one, str)]
