"""The models of the page, each with its checkpoints, of which a few are kept open."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax

from experiments.config.errors import require
from experiments.config.settings import RunConfig
from experiments.scoring.models import Checkpoints, OpenModel, open_model
from experiments.training.stored import stored_steps
from unet.files.saving import WEIGHTS

KEPT_BYTES = 2**31
"""Of models that are kept open beside the one in use."""


@dataclass(frozen=True)
class Facts:
    """What is said of a model without opening it again: as in `OpenModel`."""

    levels: int
    draws: bool
    parameters: int
    config: RunConfig | None
    step: int | None


class HeldModel:
    """A model by where it comes from. What belongs to its checkpoints is used by one thread at a time, that of its worker."""

    def __init__(self, where: str, step: int | None = None, plugins: Sequence[str] = ()):
        """Opens the model, or its checkpoint of a `step`. Raises `ConfigError` and `LoadError`."""
        self.where, self._plugins = where, tuple(plugins)
        first = open_model(where, step, plugins)
        self.first = Facts(first.levels, first.draws, first.parameters, first.config, first.step)
        self._checkpoints: Checkpoints | None = None
        self._open: OrderedDict[int | None, OpenModel] = OrderedDict({first.step: first})

    @property
    def finished(self) -> bool:
        """Whether there is a model beside the checkpoints of a run: that of its end, or one without any."""
        folder = Path(self.where)
        return not folder.is_dir() or (folder / WEIGHTS).is_file() or not self.steps

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints that there are now, ascending: a run that trains has other ones later."""
        return stored_steps(Path(self.where)) if self.first.config is not None else []

    @property
    def total_steps(self) -> int | None:
        """The steps of the whole run; None where there is none."""
        return None if self.first.config is None else self.first.config.total_steps

    def at(self, step: int | None) -> OpenModel:
        """The model of a checkpoint; with None, that of the end of the run, or of the newest checkpoint before that.

        Raises `ConfigError` and `LoadError`.
        """
        step = self._default() if step is None else step
        if step not in self._open:
            require(step is None or step in self.steps, f"{self.where} holds no checkpoint of step {step} any more")
            self._open[step] = self._read(step)
        self._open.move_to_end(step)
        self._close_oldest()
        return self._open[step]

    def is_open(self, step: int | None) -> bool:
        """Whether `at` has nothing to read."""
        return (self._default() if step is None else step) in self._open

    def _default(self) -> int | None:
        return None if self.finished else self.steps[-1]

    def _read(self, step: int | None) -> OpenModel:
        if step is None:
            return open_model(self.where, None, self._plugins)
        self._checkpoints = self._checkpoints or Checkpoints(self.where, self._plugins)
        return self._checkpoints.open(step)

    def _close_oldest(self) -> None:
        while len(self._open) > 2 and sum(map(_bytes_of, self._open.values())) > KEPT_BYTES:
            self._open.popitem(last=False)


def _bytes_of(opened: OpenModel) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(eqx.filter(opened.model, eqx.is_array)))
