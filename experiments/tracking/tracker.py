"""What a tracker is, and how one is found by its name."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from estimators.lookup import PartError, imported
from experiments.config.errors import ConfigError, refused


@runtime_checkable
class Tracker(Protocol):
    """Takes what a run measures. A class of one's own is called as `Class(run_dir, config, step)`: the folder of the run, its
    settings as in `config.json`, and the steps that are done, which are above 0 for a run that goes on.

    What its methods raise ends the tracker, with a note, and not the run.
    """

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of a training step or of a validation, by name (docs/metrics.md)."""

    def histogram(self, step: int, name: str, edges: Sequence[float], shares: Sequence[float]) -> None:
        """Shares of the values between successive `edges`."""

    def html(self, step: int, name: str, page: str) -> None:
        """A self-contained page."""

    def picture(self, step: int, name: str, png: bytes) -> None:
        """A picture as a PNG file."""

    def close(self) -> None:
        """The run has ended or stops."""


KNOWN: dict[str, str] = {
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "trackio": "trackio",
}
"""The package that each tracker of the library needs. Its module here and its extra have the name of the tracker, its class is
`NamedTracker`."""


def require_trackers(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a tracker that is not there, or whose package is not installed. Nothing of these packages is
    imported yet; modules of one's own are."""
    if len(set(names)) < len(names):
        raise ConfigError(f"--tracker {' '.join(names)} names one of them twice")
    for name in names:
        if ":" in name:
            tracker_class(name)
        elif name not in KNOWN:
            raise ConfigError(f"--tracker {name}: there are {', '.join(KNOWN)}, and classes as package.module:Class")
        elif importlib.util.find_spec(KNOWN[name]) is None:
            raise ConfigError(f"--tracker {name}: {KNOWN[name]} is not installed: pip install 'caesura-lm[{name}]'")


def tracker_class(name: str) -> type:
    """The class of a tracker. Raises `ConfigError` where there is none."""
    module, _, cls = name.partition(":") if ":" in name else (f"experiments.tracking.{name}", ":", "NamedTracker")
    try:
        found = getattr(imported("--tracker", name, module), cls, None)
    except PartError as error:
        raise refused(error) from error.__cause__
    if not isinstance(found, type) or not issubclass(found, Tracker):
        raise ConfigError(
            f"--tracker {name}: {module} has no class {cls} with the methods of a tracker: scalars, histogram, html, picture and "
            "close"
        )
    return found


def open_tracker(name: str, run_dir: Path, config: Mapping[str, object], step: int) -> Tracker:
    """A tracker of the run in `run_dir` that is at `step`. Raises what its class raises."""
    made = tracker_class(name)(run_dir, config, step)
    assert isinstance(made, Tracker)
    return made
