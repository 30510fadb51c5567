"""Hand a trained model on: `python -m experiments.export RUN --to DIR`, or `--to hub:owner/name`."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from experiments.config.errors import ConfigError
from experiments.config.files import to_json
from experiments.config.settings import RunConfig
from experiments.reporting.display import Display, command_line
from experiments.training.run_dir import SUMMARY, read_config
from unet import UNet
from unet.files.hnet_layout import LayoutError, to_reference
from unet.files.pretrained import save_hnet
from unet.files.saving import CONFIG, WEIGHTS, load, save, write_atomically

CARD = "README.md"

Layout = Literal["own", "hnet-pt", "hnet-safetensors"]
"""How files are laid out."""


@dataclass(frozen=True)
class ExportConfig:
    """Copy a finished run's model, its configuration and a page about it."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a finished run."""
    to: str
    """A new or empty folder, or hub:owner/name for a repository of the hub, which is made where there is none."""
    private: bool = False
    """Make a new repository private."""
    layout: Layout = "own"
    """As this library keeps models; or, for an H-Net, as the published ones are: weights that PyTorch loads, or safetensors, by
    their published names, and a published configuration."""


def export(config: ExportConfig, display: Display) -> None:
    """Write the three files to a folder or to the hub. Raises `ConfigError` where that cannot be."""
    run = Path(config.run)
    # What is not there is noticed before anything is made.
    model, settings = load(run).model, read_config(run)
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
    display.note(f'{config.to}: load it with unet.{function}("{config.to}")')


def _write(folder: Path, model: UNet, settings: RunConfig, summary: Path, layout: Layout) -> None:
    # The model last: a folder with one is complete.
    write_atomically(folder / CARD, card(settings, summary, layout))
    if layout != "own":
        save_hnet(model, folder, kind="pt" if layout == "hnet-pt" else "safetensors")
        return
    write_atomically(folder / CONFIG, to_json(settings))
    save(model, folder)


def card(settings: RunConfig, summary: Path, layout: Layout = "own") -> str:
    """A page about the model, with the metadata that the hub reads."""
    own = layout == "own"
    loaded = 'unet.load("FOLDER or hub:owner/name").model' if own else 'unet.load_hnet("FOLDER or owner/name")'
    lines = [
        "---",
        "library_name: caesura",
        "tags: [byte-level, learned-tokenization]",
        "---",
        "",
        f"# {settings.estimator}, {settings.model}, trained on {settings.dataset}",
        "",
        "A byte-level language model of [Caesura](https://pypi.org/project/caesura-lm/) that draws its own token boundaries.",
        "",
        "```python",
        "import jax",
        "import unet",
        "",
        f"model = {loaded}",
        'print(unet.generate(model, ["The "], max_bytes=200, key=jax.random.key(0)).texts[0].text)',
        "```",
        "",
    ]
    if summary.is_file():
        figures = json.loads(summary.read_text())
        lines += ["| | |", "|---|---|"]
        for name, label in FIGURES.items():
            if figures.get(name) is not None:
                lines.append(f"| {label} | {_figure(figures[name])} |")
        lines.append("")
    if own:
        lines.append(f"All settings of the run are in `{CONFIG}`; `{WEIGHTS}` holds the model.")
    else:
        lines.append(
            "The weights have the names and shapes of the published H-Nets; the JSON file is their configuration."
        )
    return "\n".join(lines) + "\n"


FIGURES = {
    "parameters": "parameters",
    "bytes": "bytes of training text",
    "val_bpb": "bits per byte on held-out text",
    "val_rate": "share of bytes that close a token",
    "target_rate": "the share aimed at",
    "seed": "seed",
}


def _figure(value: float | int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value


def _upload(folder: Path, repository: str, *, private: bool) -> None:
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="A model")
    except (HFValidationError, LocalTokenNotFoundError, HfHubHTTPError, OSError) as error:
        what = str(error).strip().splitlines()[0][:200]
        raise ConfigError(
            f"--to hub:{repository}: {what}; is the name right, and HF_TOKEN one that may write?"
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, or 2 for a user's error."""
    return command_line(ExportConfig, export, "experiments.export", arguments)


if __name__ == "__main__":
    sys.exit(main())
