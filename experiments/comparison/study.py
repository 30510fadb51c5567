"""What a comparison compares: named variants, from a TOML file or from flags.

title = "Discounts"            # optional, like all keys but variants
seeds = [0, 1, 2]
reference = "0.9"              # the variant that gains are relative to; the first by default
settings = { model = "tiny", dataset = "docs" }
variants."0.9" = { discount.factor = 0.9 }
variants."0.99" = { discount.factor = 0.99 }
variants.earlier = { runs = ["runs/sfe-0", "runs/sfe-1"] }
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated

from estimators.bounds import Seed, Within
from estimators.registry import BASELINE
from experiments.config.errors import ConfigError, one_line, require, require_bounds
from experiments.config.layers import Values, plain, read_file
from experiments.config.structure import structured
from experiments.reporting.metrics import metric_of

LONGEST_NAME = 80
ALONE = {
    "seed": "a study has seeds",
    "out": "a study has a folder of its own (--out)",
}
"""Settings of single runs that variants do not have, and why."""


@dataclass(frozen=True)
class Variant:
    """One line of the table. It is trained, with plain settings (`values`) or the flags that make it; or it is made of the
    finished runs in these folders. `published`: numbers of others for it, by metric."""

    name: str
    values: Values = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    runs: tuple[Path, ...] = ()
    published: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Head:
    """What a study says of itself; flags say otherwise."""

    title: str = ""
    """Title of the page."""
    about: str = ""
    """Where the study is from, and what to know of it."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds of parameters, data order and boundaries."""
    jobs: Annotated[int, Within(1, 1024)] = 1
    """Runs at a time."""
    reference: str | None = None
    """The variant that gains are relative to."""
    pairs: tuple[str, ...] = ()
    """Which variants to compare, as FIRST:SECOND; by default all with the reference."""

    def __post_init__(self):
        require_bounds(self, "")


@dataclass(frozen=True)
class Study:
    """Variants, and the settings that they have in common. `file` is None for one made from flags."""

    variants: tuple[Variant, ...]
    head: Head = field(default_factory=Head)
    settings: Values = field(default_factory=dict)
    file: Path | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the variants, in order."""
        return tuple(variant.name for variant in self.variants)

    def place(self, variant: str = "") -> str:
        """What a sentence about the study, or about one of its variants, begins with."""
        if self.file is None:
            return ""
        return f"{self.file}: " + (f"variant {one_line(variant, LONGEST_NAME)}: " if variant else "")


def of_estimators(names: Sequence[str]) -> Study:
    """The study whose variants differ in their estimators; gains are relative to uniform boundaries where these are among
    them."""
    variants = tuple(Variant(name, flags=("--estimator", name)) for name in names)
    return Study(variants, Head(reference=BASELINE if BASELINE in names else None))


def shipped() -> list[str]:
    """The names of the studies that come with the library."""
    folder = resources.files("experiments.studies")
    return sorted(path.name.removesuffix(".toml") for path in folder.iterdir() if path.name.endswith(".toml"))


def found(named: Path) -> Path:
    """The file of a study: a path, or the name of one that comes with the library. Raises `ConfigError` for neither."""
    if named.exists():
        return named
    if str(named) in shipped():
        return Path(str(resources.files("experiments.studies") / f"{named}.toml"))
    raise ConfigError(f"--study {named}: there is no such file, nor is it one of {', '.join(shipped())}")


def read_study(path: Path) -> Study:
    """The study in a TOML, YAML or JSON file. Raises `ConfigError` in one sentence that names file, variant and key."""
    tables = read_file(path, "--study")
    settings, variants = tables.pop("settings", {}), tables.pop("variants", None)
    try:
        head = structured(tables, Head)
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: settings is no table of settings")
    if not isinstance(variants, dict) or not variants:
        raise ConfigError(f"{path}: variants is no table of variants: a study has at least one")
    read = tuple(_variant(path, name, table) for name, table in variants.items())
    study = Study(read, head, _plain(settings, f"{path}: settings"), path)
    require(
        head.reference is None or head.reference in study.names,
        f"{path}: reference: {one_line(repr(head.reference), 60)} is none of {one_line(', '.join(study.names))}",
    )
    return study


def _variant(path: Path, name: str, table: object) -> Variant:
    where = f"{path}: variant {one_line(name, LONGEST_NAME)}"
    require(
        0 < len(name) <= LONGEST_NAME and name.isprintable() and name.strip() == name and not set("|`") & set(name),
        f"{where}: a name has 1 to {LONGEST_NAME} characters that can be printed, no | or ` and no space around them",
    )
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: it is no table of settings")
    rest = dict(table)
    runs, published = rest.pop("runs", None), rest.pop("published", {})
    if runs is None:
        return Variant(name, _plain(rest, where), published=_published(published, where))
    if not isinstance(runs, list) or not runs or not all(isinstance(one, str) for one in runs):
        raise ConfigError(f"{where}: runs is no list of folders of finished runs")
    require(not rest, f"{where}: {', '.join(rest)}: the runs are finished already, so they take no settings")
    return Variant(name, runs=tuple(map(Path, runs)), published=_published(published, where))


def _plain(values: Values, where: str) -> Values:
    try:
        settings = plain(values)
        for name, reason in ALONE.items():
            require(name not in settings, f"{name}: {reason}")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return settings


def _published(values: object, where: str) -> dict[str, float]:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: published is no table of numbers by metric")
    numbers = {}
    for name, value in values.items():
        require(metric_of(name) is not None, f"{where}: published.{name}: there is no such metric (docs/metrics.md)")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{where}: published.{name}: {one_line(repr(value), 60)} is no number")
        numbers[name] = float(value)
    return numbers
