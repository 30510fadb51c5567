"""What `--model_args` of lm-evaluation-harness may say of a model of this library."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from estimators.bounds import Count, Length, Seed, Within
from experiments.config.arguments import expanded
from experiments.config.errors import ConfigError, one_line, require, require_bounds
from experiments.scoring.cache import ScoreCache, default_folder
from experiments.scoring.models import open_model
from experiments.scoring.plans import plan_of
from experiments.scoring.score import BoundaryChoice
from experiments.tasks.generations import BATCH, Generations
from experiments.tasks.likelihoods import COMBINATIONS, Likelihoods

BytesPerToken = Annotated[int, Within(1, 1024)]


@dataclass(frozen=True)
class ModelArguments:
    """A model and how it is scored: as the options of `experiments.evaluate` with these names.

    `combine`: with several samples, `mean` of their log-probabilities or `log-mean-exp`. `batch_size`: requests beside each
    other. `plugin`: several are joined by `+`.
    """

    path: str
    step: Count | None = None
    boundaries: BoundaryChoice | None = None
    samples: Annotated[int, Within(1, 1024)] | None = None
    combine: str = "mean"
    seed: Seed = 0
    context: Length | None = None
    stride: Annotated[int, Within(1, 2**24)] | None = None
    bytes_per_token: BytesPerToken = 4
    batch_size: Annotated[int, Within(1, 2**16)] | None = None
    cache: str | None = None
    keep: bool = True
    plugin: str | None = None

    def __post_init__(self):
        require(bool(self.path), "--model_args needs the path of a model: path=runs/a")
        require_bounds(self, "")

    @classmethod
    def of(cls, given: Mapping[str, object]) -> ModelArguments:
        """The arguments of these names; None leaves the default. Raises `ConfigError` for others, and for impossible values."""
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(given.keys() - set(names))
        if unknown:
            raise ConfigError(f"--model_args has no {one_line(unknown[0])}: it takes {', '.join(names)}")
        plain = {name: _plain(name, value) for name, value in given.items()}
        values = {name: value for name, value in plain.items() if value is not None}
        return dataclasses.replace(cls(str(values.pop("path", ""))), **values)

    def opened(self) -> tuple[Likelihoods, Generations]:
        """The model, opened. Raises `ConfigError` and `LoadError`."""
        plugins = () if self.plugin is None else tuple(self.plugin.split("+"))
        model = open_model(expanded(self.path), self.step, plugins)
        plan = plan_of(self, [model], "greedy")
        folder = default_folder() if self.cache is None else Path(expanded(self.cache))
        cache = ScoreCache(folder if self.keep else None)
        cache.check()
        cache.evict()
        return (
            Likelihoods(model, plan, cache, self.batch_size),
            Generations(model, plan, cache, self.batch_size or BATCH),
        )


CHOICES = {"boundaries": ("greedy", "drawn"), "combine": tuple(COMBINATIONS), "keep": (True, False)}
TEXTS = ("path", "boundaries", "combine", "cache", "plugin")


def _plain(name: str, value: object) -> object:
    """A value as the harness's parser leaves it; names that look like numbers are names all the same. Raises `ConfigError` for
    what is none of a few choices."""
    if value is None or value == "None":
        return None
    plain = str(value) if name in TEXTS else value
    if name in CHOICES and plain not in CHOICES[name]:
        raise ConfigError(f"{name}={one_line(str(value))}: {' or '.join(map(str, CHOICES[name]))}")
    return int(plain) if name not in TEXTS and isinstance(plain, str) and plain.isdecimal() else plain
