"""Settings in files that people write, or that a run left, put on top of those of a preset."""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path

import yaml

from estimators.lookup import PartError
from experiments.config.arguments import expanded
from experiments.config.errors import ConfigError, one_line
from experiments.config.parts import house_sections
from experiments.config.plugins import require_known
from experiments.config.presets import PRESETS, joined
from experiments.config.settings import RunConfig
from experiments.config.structure import parsed, structured

Values = Mapping[str, object]

NOT_IN_FILES = {
    "resume": "it is for the command line",
    "overwrite": "it is for the command line",
    "config": "it is for the command line",
    "plugin": "what may be imported is for the command line to say (--plugin)",
}
"""Settings that a file may not have, and why."""

_FIELDS = {one.name for one in dataclasses.fields(RunConfig)}


class _Loader(yaml.SafeLoader):
    """YAML whose numbers may be written 1e-3, as in TOML, JSON and flags."""


_Loader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_file(path: Path, flag: str) -> dict[str, object]:
    """What is in a TOML, YAML or JSON file, which its ending tells apart. Raises `ConfigError` in a sentence that begins with
    `flag`."""
    ending = path.suffix.lower()
    try:
        if ending not in (".toml", ".yaml", ".yml", ".json"):
            raise ValueError("its name ends in none of .toml, .yaml, .yml, .json")
        text = path.read_bytes().decode()
        if ending == ".toml":
            return tomllib.loads(text)
        found = parsed(text) if ending == ".json" else yaml.load(text, _Loader)
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            raise ValueError("it holds no settings by name")
        return found
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error.strerror or type(error).__name__}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag} {path} is not UTF-8 from byte {error.start} on") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{flag} {path}: {one_line(' '.join(str(error).split()))}") from None


def plain(values: Values) -> dict[str, object]:
    """The same settings as a run has them: names with underscores, sections of parts under `settings`, "None" as None, 12e6 as a
    whole number. Raises `ConfigError` for a setting that is there twice, and for what is nested too deep."""
    try:
        named = _renamed(values)
    except RecursionError:
        raise ConfigError("it is nested too deep") from None
    sections = {name: value for name, value in named.items() if name not in _FIELDS and isinstance(value, dict)}
    inside = named.get("settings", {})
    if sections and isinstance(inside, dict):
        named = {name: value for name, value in named.items() if name not in sections}
        named["settings"] = joined(inside, sections)
    return named


def _renamed(values: Values) -> dict[str, object]:
    named: dict[str, object] = {}
    for name, value in values.items():
        own = str(name).replace("-", "_")
        if own in named:
            raise ConfigError(f"{own} is there twice, with a hyphen and with an underscore")
        named[own] = _plain_value(value)
    return named


def _plain_value(value: object) -> object:
    if isinstance(value, dict):
        return _renamed(value)
    if isinstance(value, list):
        return [_plain_value(one) for one in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    return None if value == "None" else value


def sections_of(values: Values) -> set[str]:
    """The sections of parts in `plain` values."""
    inside = values.get("settings")
    return set(inside) if isinstance(inside, dict) else set()


def preset(values: Values, model: str | None = None) -> RunConfig:
    """The preset that `plain` values name; `model` instead where it is given. Raises `ConfigError` for none."""
    name = values.get("model", "tiny") if model is None else model
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"model: {one_line(repr(name), 60)} is none of {', '.join(PRESETS)}")
    return PRESETS[name]


def with_values(base: RunConfig, values: Values, plugins: Collection[str] = ()) -> RunConfig:
    """`base` with `plain` values on top. `plugins`: modules whose classes they may name.

    Raises `ConfigError` in one sentence that names the setting.
    """
    for name in values:
        if name in NOT_IN_FILES:
            raise ConfigError(f"{name}: {NOT_IN_FILES[name]}")
        if name not in _FIELDS:
            raise ConfigError(f"there is no setting {name}{_alike(name, _FIELDS)}")
    require_known(values, plugins, "it")
    own = {name: value for name, value in values.items() if name != "model"}
    # Of the two ways to say how long a run is, the file's counts.
    length = {"steps": None} if "bytes" in own and "steps" not in own else {}
    try:
        return structured(joined(dataclasses.asdict(base), {**length, **own}), RunConfig)
    except (ValueError, OverflowError, RecursionError, PartError, ConfigError) as error:
        raise ConfigError(one_line(str(error), 400)) from None


def from_file(path: Path, model: str | None, plugins: Collection[str] = ()) -> RunConfig:
    """The run that a file describes; `model`: the preset below it, instead of the one that it names. The folder of the run that
    left the file is no setting. Raises `ConfigError` in a sentence that names file and setting."""
    values = read_file(path, "--config")
    try:
        named = plain(values)
        for name in ("resume", "overwrite"):
            # As in every config.json.
            if named.get(name) is False:
                del named[name]
        out = named.get("out")
        if isinstance(out, str) and Path(expanded(out), path.name).resolve() == path.resolve():
            del named["out"]
        if model is not None and "unet" in named and model != named.get("model"):
            raise ConfigError(
                f"--model {model} would have no effect on the shape that the file has: leave out one of them"
            )
        run = with_values(preset(named, model), named, plugins)
        require_used(sections_of(named), [run])
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from None
    return run


def require_used(sections: Collection[str], runs: Collection[RunConfig]) -> None:
    """Raise `ConfigError` where none of the `runs` has settings of these names."""
    used = set().union(*(run.sections for run in runs))
    for name in sorted(set(sections) - used):
        if name in (house := house_sections()):
            raise ConfigError(f"{name}: these are settings of {house[name].owner}, which was not chosen")
        raise ConfigError(
            f"there is no setting {name}{_alike(name, _FIELDS | used)}: nothing that is chosen has settings of that name"
        )


def _alike(name: str, names: Collection[str]) -> str:
    close = difflib.get_close_matches(name, sorted(names), 1)
    return f" (did you mean {close[0]}?)" if close else ""
