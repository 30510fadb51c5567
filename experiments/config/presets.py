"""Named sizes. The defaults of every other flag come from the preset that --model names; the numbers are in `presets.toml`."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from importlib import resources

from experiments.config.settings import RunConfig
from experiments.config.structure import structured
from unet.files.pretrained import PUBLISHED
from unet.files.published import shape_of

Table = Mapping[str, object]


def read_presets(text: str) -> dict[str, RunConfig]:
    """The runs that a TOML document describes, by name. Raises `ValueError` for a setting that does not exist."""
    tables = tomllib.loads(text)
    presets = {}
    for name in tables:
        if not name.startswith("_"):
            values = _whole(name, tables)
            shape = values["unet"]
            assert isinstance(shape, dict)
            if isinstance(published := shape.pop("published", None), str):
                values["unet"] = dataclasses.asdict(shape_of(PUBLISHED[published])) | shape
            presets[name] = structured({**values, "model": name}, RunConfig, name)
    return presets


def _whole(name: str, tables: Mapping[str, Table]) -> dict[str, object]:
    """A table on top of those that it is like."""
    own = dict(tables[name])
    like = own.pop("like", None)
    return joined(_whole(like, tables), own) if isinstance(like, str) else joined({}, own)


def joined(below: Table, above: Table) -> dict[str, object]:
    """Two tables, the values `above` winning; tables within are joined likewise."""
    both = dict(below)
    for name, value in above.items():
        old = both.get(name)
        both[name] = joined(old if isinstance(old, Mapping) else {}, value) if isinstance(value, Mapping) else value
    return both


PRESETS = read_presets((resources.files("experiments.config") / "presets.toml").read_text())
