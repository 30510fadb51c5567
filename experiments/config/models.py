"""Any model that a command may be given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from experiments.config.plugins import load_model, require_numbers
from unet.files.pretrained import load_pretrained
from unet.files.saving import WEIGHTS, Loaded, describes_itself


def load_any(where: str, plugins: Sequence[ModuleType] = ()) -> Loaded:
    """A run's or an exported model, `hub:owner/name`, or a published model by its name on the hub or by its file, which has no
    settings of a run. `plugins` are modules whose classes it may hold. Raises `LoadError` and `ConfigError`."""
    path = Path(where)
    if where.startswith("hub:") or describes_itself(path / WEIGHTS if path.is_dir() else path):
        return load_model(where, plugins)
    model = load_pretrained(where)
    require_numbers(model, where)
    return Loaded(model, {})
