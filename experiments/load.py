"""A finished run's model, from its folder."""

from __future__ import annotations

from pathlib import Path

from experiments.config import ConfigError
from experiments.folder import read_config
from experiments.found import read_found
from experiments.weights import read_model
from unet import UNet


def load_model(folder: Path) -> UNet:
    """The model that a finished run left. Raises `ConfigError` where there is none, or where files do not fit together."""
    config = read_config(folder)
    found = read_found(folder, config)
    if found is None:
        raise ConfigError(f"{folder} lacks what its estimator took from the data: its run is not finished")
    return read_model(folder, config, found)
