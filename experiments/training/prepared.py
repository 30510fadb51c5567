"""What some estimators find out from text before training, such as a vocabulary, kept with the run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import equinox as eqx
from jaxtyping import PyTree

from data import Split
from experiments.config.errors import ConfigError, outside_errors, require
from experiments.config.plugins import modules_of
from experiments.config.settings import RunConfig
from experiments.processes.processes import ALONE, AbstractProcesses
from experiments.training.distil import distill_figures, read_teacher
from experiments.training.run_dir import PREPARED
from experiments.training.text import RunText
from experiments.training.tokenizer import prepare_tokenizer, tokenizer_figures, tokenizer_notes
from unet.files.saving import load_module, module_content, save_module


def prepare(config: RunConfig, split: Split, processes: AbstractProcesses = ALONE) -> PyTree:
    """What the estimator of `config` takes from the training text, the tokenizer of a model that reads tokens, or the teacher of
    one that is distilled; None where nothing is taken. A run that goes on has it in its folder. Of several `processes` the first
    reads what a stream begins with, for all. Raises `ConfigError` where that is impossible, and `LoadError` for a damaged
    file."""
    if processes.count == 1 or split.training is not None:
        return _prepared(config, split)

    def made() -> bytes:
        prepared = _prepared(config, split)
        return b"" if prepared is None else b"".join(module_content(prepared))

    content = processes.once(made)
    if not content:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PREPARED
        path.write_bytes(content)
        return load_module(path, modules_of(config))


def _prepared(config: RunConfig, split: Split) -> PyTree:
    found = read_prepared(config) if config.resume else None
    if found is not None:
        return found
    if config.distill.teacher is not None:
        return read_teacher(config)
    if config.reads_tokens:
        return prepare_tokenizer(config, split)
    with outside_errors(config.parts[0].all[:1]):
        try:
            prepared = config.first.prepare(RunText(config, split))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"--estimator {config.estimator}: {error}") from error
    what = f"--estimator {config.estimator}: prepare returned a {type(prepared).__name__}"
    require(prepared is None or isinstance(prepared, eqx.Module), f"{what}, not an equinox.Module")
    return prepared


def require_prerequisite(config: RunConfig) -> None:
    """Raise `ConfigError` where an estimator reads the model of another run and none is named."""
    needs = config.first.prerequisite
    if needs is not None and getattr(config.first, needs.setting) is None:
        section = config.parts[0].estimator.section
        flags = " ".join(
            f"--{name}.{'' if value else 'no-'}{key.replace('_', '-')}"
            if isinstance(value, bool)
            else f"--{name}.{key} {value}"
            for name, values in needs.settings.items()
            for key, value in values.items()
        )
        raise ConfigError(
            f"--estimator {config.estimator} needs the model of another run: train one with --estimator {needs.estimator} "
            f"{flags} and name its folder with --{section}.{needs.setting}"
        )


def write_prepared(folder: Path, prepared: PyTree) -> None:
    """Save it in a run's folder: checkpoints do not hold it."""
    if prepared is not None:
        save_module(prepared, folder / PREPARED)


def read_prepared(config: RunConfig) -> PyTree:
    """What `write_prepared` saved in the folder of a run; None where there is nothing. Raises `LoadError` for a damaged file."""
    path = config.run_dir / PREPARED
    return load_module(path, modules_of(config)) if path.is_file() else None


def notes_of(config: RunConfig, prepared: PyTree) -> list[str]:
    """What a user should know of what was prepared."""
    if prepared is None or config.distill.teacher is not None:
        return []
    return tokenizer_notes(config, prepared) if config.reads_tokens else config.first.notes(prepared, config.rate)


def figures_of(config: RunConfig, prepared: PyTree) -> Mapping[str, float | int]:
    """What the summary of a run says of what was prepared."""
    if prepared is None:
        return {}
    if config.distill.teacher is not None:
        return distill_figures(prepared)
    return tokenizer_figures(prepared) if config.reads_tokens else config.first.figures(prepared)
