"""The file that a run's settings are kept in."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TypeVar, get_origin, get_type_hints

from experiments.config.errors import ConfigError
from experiments.config.settings import RunConfig
from unet.config import UNetConfig
from unet.hnet import HNetConfig


def to_json(config: RunConfig) -> str:
    """The configuration as JSON text, paths as strings."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def from_json(text: str, where: str) -> RunConfig:
    """The configuration that `to_json` wrote. Raises `ConfigError`, naming `where`, if it is anything else."""
    try:
        values: dict[str, object] = json.loads(text)
        shape = values["unet"]
        kinds = get_type_hints(RunConfig)
        kinds["unet"] = HNetConfig if isinstance(shape, dict) and "layout" in shape else UNetConfig
        for name, kind in kinds.items():
            # A setting that is newer than the file was what its default is.
            if dataclasses.is_dataclass(kind) and name in values:
                values[name] = _build(kind, values[name])
        return _build(RunConfig, values)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"{where} is not the configuration of a run ({error})") from None


Built = TypeVar("Built")


def _build(kind: type[Built], values: object) -> Built:
    if not isinstance(values, dict):
        raise TypeError(f"{kind.__name__} is written as an object, not {values!r}")
    hints = get_type_hints(kind)
    if unknown := sorted(values.keys() - hints.keys()):
        raise TypeError(f"{kind.__name__} has no setting {', '.join(unknown)}: another version wrote it")
    paths = {name: Path(value) for name, value in values.items() if hints[name] == Path | None and value is not None}
    # JSON has lists only.
    tuples = {name: tuple(value) for name, value in values.items() if get_origin(hints[name]) is tuple}
    return kind(**values | paths | tuples)
