"""The file that the settings of a run are kept in, read back with every type checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection

from experiments.config.errors import ConfigError, one_line, require
from experiments.config.plugins import require_known
from experiments.config.settings import RunConfig
from experiments.config.structure import parsed, structured


def to_json(config: RunConfig) -> str:
    """The configuration as JSON text, paths as strings."""
    values = dataclasses.asdict(config.resolved)
    # What a command may import is for whoever gives the command to say; the others say how it is given.
    for name in ("plugin", "config", "quiet", "tracker", "distributed"):
        del values[name]
    return json.dumps(values, indent=2, default=str) + "\n"


def from_json(text: str | bytes, where: str, plugins: Collection[str] = ()) -> RunConfig:
    """The configuration that `to_json` wrote. A setting that is missing has its default. `plugins`: modules that it may name.

    Raises `ConfigError`, naming `where` and the setting, for anything else.
    """
    try:
        values = parsed(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not the configuration of a run ({error})") from None
    return from_values(values, where, plugins)


def from_values(values: object, where: str, plugins: Collection[str] = ()) -> RunConfig:
    """The same from JSON that is parsed already."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is not the configuration of a run: it is no JSON object")
    require_known(values, plugins, where)
    try:
        require("plugin" not in values, "there is no setting plugin")
        config = structured(values, RunConfig)
        unused = sorted(config.settings.keys() - config.sections.keys())
        require(not unused, f"nothing it names has settings {', '.join(unused)}")
    except (ValueError, OverflowError, RecursionError, ConfigError) as error:
        raise ConfigError(
            f"{where} is not the configuration of a run of this version: {one_line(str(error))}"
        ) from None
    return config
