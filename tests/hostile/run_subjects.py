"""The files of a run's folder."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.config.errors import ConfigError
from experiments.config.files import from_values, to_json
from experiments.config.presets import PRESETS
from experiments.config.settings import RunConfig
from experiments.training.run_dir import CONFIG, read_config
from tests.hostile.subject import Subject


def _configs(folder: Path) -> list[bytes]:
    """Configurations of several kinds, the largest sections among them."""
    tiny = PRESETS["tiny"]
    plain = to_json(tiny)
    entropy = json.loads(plain) | {
        "estimator": "entropy",
        "settings": {"entropy": {"model": "runs/bytes", "rule": "rise"}},
    }
    hnet = to_json(PRESETS["hnet-2stage-tiny"])
    return [plain.encode(), to_json(from_values(entropy, "seed")).encode(), hnet.encode()]


def _read_config(folder: Path, content: bytes) -> RunConfig:
    (folder / CONFIG).write_bytes(content)
    return read_config(folder)


SUBJECTS = (Subject("config.json", _configs, _read_config, (ConfigError,), "json"),)
