"""Any model that a command may be given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from experiments.config.plugins import load_model, require_numbers
from unet.files.blt_config import is_blt
from unet.files.decoder_config import is_decoder
from unet.files.errors import LoadError
from unet.files.json_files import read_json
from unet.files.pretrained import load_pretrained
from unet.files.saving import CONFIG, WEIGHTS, Loaded, describes_itself
from unet.files.weights import TORCH


def is_published(where: str) -> bool:
    """Whether this names a published model: a file or folder with a published configuration beside it, or owner/name, for the
    hub, where there is no such folder."""
    path = Path(where)
    if not path.exists():
        # Where there is a folder of the owner's name, the path was mistyped: the hub is not asked.
        named = where.count("/") == 1 and not where.startswith((".", "/", "~", "hub:"))
        return named and path.suffix not in (".safetensors", ".json", *TORCH) and not path.parent.exists()
    if describes_itself(path / WEIGHTS if path.is_dir() else path):
        return False
    return any(map(_is_published_config, (path if path.is_dir() else path.parent).glob("*.json")))


def _is_published_config(path: Path) -> bool:
    found = _config(path)
    return is_blt(found) or is_decoder(found) or "arch_layout" in found


def _config(path: Path) -> dict[str, object]:
    """What a JSON file says; nothing where there is none that can be read."""
    try:
        return read_json(path)
    except (LoadError, OSError):
        return {}


def load_any(where: str, plugins: Sequence[ModuleType] = ()) -> Loaded:
    """A run's or an exported model, `hub:owner/name`, or a published model by its name on the hub or by its file, which has no
    settings of a run. `plugins` are modules whose classes it may hold. Raises `LoadError` and `ConfigError`."""
    path = Path(where)
    file = path / WEIGHTS if path.is_dir() else path
    # A file of our name is ours, however damaged, and so is an unfinished run; unless there is a published configuration in the
    # folder. A path that leads nowhere was mistyped.
    here = (file.name == WEIGHTS and file.is_file()) or "estimator" in _config(path / CONFIG)
    ours = not is_published(where) and (here or not path.exists())
    if where.startswith("hub:") or ours or describes_itself(file):
        return load_model(where, plugins)
    model = load_pretrained(where)
    require_numbers(model, where)
    return Loaded(model, {})
