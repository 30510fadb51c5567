"""Export a trained model: `python -m experiments.export RUN --to DIR`, or `--to hub:owner/name`."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from experiments.command import command_line
from experiments.config.arguments import expanded
from experiments.config.errors import ConfigError
from experiments.config.files import to_json
from experiments.config.plugins import import_plugins, load_model, modules_of
from experiments.config.settings import RunConfig
from experiments.launch import program
from experiments.reporting.display import Display
from experiments.reporting.terminal import escaped
from experiments.training.run_dir import SUMMARY, read_config
from unet import UNet
from unet.files.hnet_layout import LayoutError, to_reference
from unet.files.pretrained import save_hnet
from unet.files.saving import CONFIG, WEIGHTS, save, write_atomically

CARD = "README.md"

ExportLayout = Literal["own", "hnet-pt", "hnet-safetensors"]
"""Format of the exported files."""


@dataclass(frozen=True)
class ExportConfig:
    """Export the model of a finished run with its configuration and a model card."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a finished run."""
    to: str
    """A new or empty folder, or hub:owner/name for a repository on the hub, which is created if it does not exist."""
    plugin: tuple[str, ...] = ()
    """Modules with classes of your own that the run holds, as package.module."""
    private: bool = False
    """Create a new repository as private."""
    layout: ExportLayout = "own"
    """own: the format of this library. hnet-pt, hnet-safetensors: for an H-Net, the format of the published checkpoints, with
    weights for PyTorch or as safetensors, under their published names."""


def export(config: ExportConfig, display: Display) -> None:
    """Write weights, configuration and model card to a folder or to the hub.

    Raises `ConfigError` for a model without the requested layout, for a folder that is not empty, and if the hub refuses.
    """
    config = dataclasses.replace(config, run=expanded(config.run), to=expanded(config.to))
    run = Path(config.run)
    # Missing files raise an error before anything is written.
    model, settings = load_model(run, import_plugins(config.plugin)).model, read_config(run, config.plugin)
    if config.layout != "own":
        try:
            to_reference(model)
        except LayoutError as error:
            raise ConfigError(f"--layout {config.layout}: {error}") from None
    if config.to.startswith("hub:"):
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder), model, settings, run / SUMMARY, config.layout)
            _upload(Path(folder), config.to[4:], private=config.private)
    else:
        folder = Path(config.to)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"--to {folder} is not empty; name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, model, settings, run / SUMMARY, config.layout)
    function = "load" if config.layout == "own" else "load_hnet"
    known = _known(settings) if config.layout == "own" else ""
    display.note(f'{config.to}: load it with unet.{function}("{config.to}"{known})')


def _write(folder: Path, model: UNet, settings: RunConfig, summary: Path, layout: ExportLayout) -> None:
    # The model is written last, so that a folder with a model is complete.
    write_atomically(folder / CARD, card(settings, summary, layout))
    if layout != "own":
        save_hnet(model, folder, kind="pt" if layout == "hnet-pt" else "safetensors")
        return
    write_atomically(folder / CONFIG, to_json(settings))
    save(model, folder)


def _known(settings: RunConfig) -> str:
    """The argument of `unet.load` that names the modules of outside classes; empty without any."""
    modules = ", ".join(module.__name__ for module in modules_of(settings))
    return f", known=[{modules}]" if modules else ""


def card(settings: RunConfig, summary: Path, layout: ExportLayout = "own") -> str:
    """The model card, with metadata for the hub."""
    own = layout == "own"
    loaded = (
        f'unet.load("FOLDER or hub:owner/name"{_known(settings)}).model'
        if own
        else 'unet.load_hnet("FOLDER or owner/name")'
    )
    lines = [
        "---",
        "library_name: caesura",
        "tags: [byte-level, learned-tokenization]",
        "---",
        "",
        f"# {settings.estimator}, {settings.model}, trained on {escaped(settings.dataset)}",
        "",
        "A byte-level language model of [Caesura](https://pypi.org/project/caesura-lm/) that draws its own token boundaries.",
        "",
        "```python",
        "import jax",
        "import unet",
        *(f"import {module.__name__}" for module in modules_of(settings)),
        "",
        f"model = {loaded}",
        'print(unet.generate(model, ["The "], max_bytes=200, key=jax.random.key(0)).texts[0].text)',
        "```",
        "",
    ]
    if summary.is_file():
        values = json.loads(summary.read_text())
        lines += ["| | |", "|---|---|"]
        for name, label in CARD_METRICS.items():
            if values.get(name) is not None:
                lines.append(f"| {label} | {_number(values[name])} |")
        lines.append("")
    if own:
        lines.append(f"All settings of the run are in `{CONFIG}`; `{WEIGHTS}` holds the model.")
    else:
        lines.append(
            "The weights have the names and shapes of the published H-Nets; the JSON file is their configuration."
        )
    return "\n".join(lines) + "\n"


CARD_METRICS = {
    "parameters": "parameters",
    "bytes": "bytes of training text",
    "val_bpb": "bits per byte on held-out text",
    "val_rate": "fraction of bytes with a boundary",
    "target_rate": "target of this fraction",
    "seed": "seed",
}


def _number(value: float | int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value


def _upload(folder: Path, repository: str, *, private: bool) -> None:
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="A model")
    except (HFValidationError, LocalTokenNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(
            f"--to hub:{repository}: {reason}; check the name, and that HF_TOKEN may write to it"
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    return command_line(ExportConfig, export, "experiments.export", arguments)


if __name__ == "__main__":
    program(main)
