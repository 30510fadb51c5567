"""Export a trained model: `python -m experiments.export RUN --to DIR`, or `--to hub:owner/name`."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import httpx2
import tyro
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from estimators.bounds import Count
from experiments.command import command_line
from experiments.config.arguments import expanded
from experiments.config.errors import ConfigError
from experiments.config.files import to_json
from experiments.config.plugins import modules_of, require_bytes
from experiments.config.settings import RunConfig
from experiments.config.structure import Flat
from experiments.launch import program
from experiments.reporting.display import Display
from experiments.scoring.models import open_model
from experiments.terminal import escaped
from experiments.training.run_dir import SUMMARY, is_temporary, make_folder, read_config, read_summary
from unet.files import hnet_layout
from unet.files.blt_written import reference_config as blt_config
from unet.files.errors import LayoutError
from unet.files.pretrained import save_blt, save_hnet
from unet.files.saving import CONFIG, WEIGHTS, save, write_atomically
from unet.files.weights import is_shard
from unet.language_model import AbstractLanguageModel

CARD = "README.md"
FILES = (CARD, CONFIG, WEIGHTS, "model.json", "model.pt")
"""What an export leaves, whichever its layout."""
_UNFINISHED = ".export.tmp"
"""Folder inside that of an export, while it is written."""

ExportLayout = Literal["own", "hnet-pt", "hnet-safetensors", "blt"]
"""Format of the exported files."""

LOADS = {"hnet-pt": "load_hnet", "hnet-safetensors": "load_hnet", "blt": "load_pretrained"}
"""The function of `unet` that loads each of the published formats."""


@dataclass(frozen=True)
class ExportConfig:
    """Export the model of a run with its configuration and a model card."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a run; of one that is not finished its newest checkpoint."""
    to: str
    """A new or empty folder, or hub:owner/name for a repository on the hub, which is created if it does not exist."""
    step: Count | None = None
    """Export the checkpoint of this step."""
    plugin: tuple[str, ...] = ()
    """Modules with classes of your own that the run holds, as package.module."""
    private: bool = False
    """Create a new repository as private."""
    layout: ExportLayout = "own"
    """own: the format of this library. hnet-pt, hnet-safetensors: for an H-Net, the format of the published checkpoints, with
    weights for PyTorch or as safetensors, under their published names. blt: for a Byte Latent Transformer, what transformers
    reads."""


def export(config: ExportConfig, display: Display) -> None:
    """Write weights, configuration and model card to a folder or to the hub.

    Raises `ConfigError` for a model without the requested layout, for a folder that is not empty, and if the hub refuses, and
    `RunError` for a folder that cannot be written to. An export that was killed can be done again.
    """
    config = dataclasses.replace(config, run=expanded(config.run), to=expanded(config.to))
    run = Path(config.run)
    if not config.to.startswith("hub:"):
        _require_free(Path(config.to))
    # Missing files raise an error before anything is written.
    opened = open_model(config.run, config.step, config.plugin)
    settings = read_config(run, config.plugin)
    model, summary = opened.model, _summary(run, opened.step)
    if config.layout != "own":
        try:
            own = require_bytes(model, run)
            blt_config(own) if config.layout == "blt" else hnet_layout.to_reference(own)
        except LayoutError as error:
            raise ConfigError(f"--layout {config.layout}: {error}") from None
    if config.to.startswith("hub:"):
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder), model, settings, summary, config.layout)
            _upload(Path(folder), config.to[4:], private=config.private)
    else:
        _write_to(Path(config.to), model, settings, summary, config.layout)
    function = "load" if config.layout == "own" else LOADS[config.layout]
    known = _known(settings) if config.layout == "own" else ""
    display.note(f'{config.to}: load it with unet.{function}("{config.to}"{known})')


def _summary(run: Path, step: int | None) -> Flat:
    """What the card says of a model: the summary of its run, or the step of its checkpoint."""
    if step is not None:
        return {"step": step}
    return read_summary(run) if (run / SUMMARY).is_file() else {}


def _require_free(folder: Path) -> None:
    """Raise `ConfigError` for a folder with anything in it, but for what an export left that was killed."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--to {folder} is a file; name a folder")
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    unfinished = {_UNFINISHED, *FILES, *filter(is_shard, present)} if _UNFINISHED in present else set[str]()
    if any(not is_temporary(name) for name in present - unfinished):
        raise ConfigError(f"--to {folder} is not empty; name a new folder")


def _write_to(
    folder: Path, model: AbstractLanguageModel, settings: RunConfig, summary: Flat, layout: ExportLayout
) -> None:
    """Write to a folder inside first: while that is there, the export is not complete."""
    make_folder(folder, "--to")
    _require_free(folder)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    unfinished = folder / _UNFINISHED
    unfinished.mkdir()
    _write(unfinished, model, settings, summary, layout)
    for path in sorted(unfinished.iterdir()):
        path.rename(folder / path.name)
    unfinished.rmdir()


def _write(
    folder: Path, model: AbstractLanguageModel, settings: RunConfig, summary: Flat, layout: ExportLayout
) -> None:
    write_atomically(folder / CARD, card(settings, summary, layout))
    if layout == "blt":
        save_blt(require_bytes(model, settings.model), folder)
        return
    if layout != "own":
        save_hnet(require_bytes(model, settings.model), folder, kind="pt" if layout == "hnet-pt" else "safetensors")
        return
    write_atomically(folder / CONFIG, to_json(settings))
    save(model, folder)


def _known(settings: RunConfig) -> str:
    """The argument of `unet.load` that names the modules of outside classes; empty without any."""
    modules = ", ".join(module.__name__ for module in modules_of(settings))
    return f", known=[{modules}]" if modules else ""


def card(settings: RunConfig, summary: Flat, layout: ExportLayout = "own") -> str:
    """The model card, with metadata for the hub."""
    own = layout == "own"
    loaded = (
        f'unet.load("FOLDER or hub:owner/name"{_known(settings)}).model'
        if own
        else f'unet.{LOADS[layout]}("FOLDER or owner/name")'
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
    if summary:
        lines += ["| | |", "|---|---|"]
        for name, label in CARD_METRICS.items():
            if (value := summary.get(name)) is not None:
                lines.append(f"| {label} | {_number(value)} |")
        lines.append("")
    if own:
        lines.append(f"All settings of the run are in `{CONFIG}`; `{WEIGHTS}` holds the model.")
    else:
        whose = "`BltForCausalLM` in transformers" if layout == "blt" else "the published H-Nets"
        lines.append(f"The weights have the names and shapes of {whose}; the JSON file is their configuration.")
    return "\n".join(lines) + "\n"


CARD_METRICS = {
    "step": "training steps, of a checkpoint",
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
    except (HFValidationError, LocalTokenNotFoundError, HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(
            f"--to hub:{repository}: {reason}; check the name, and that HF_TOKEN may write to it"
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    return command_line(ExportConfig, export, "experiments.export", arguments)


if __name__ == "__main__":
    program(main)
