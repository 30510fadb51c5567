"""What an evaluation reads, all of it checked before anything is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.config.errors import require
from experiments.config.sections import DataConfig
from experiments.config.settings import RunConfig
from experiments.evaluation.byte_scores import Text
from experiments.evaluation.references import (
    SMALLEST_VOCABULARY,
    encoding_cuts,
    learn_encoding,
    read_encoding,
    read_reference,
    targets_of,
)
from experiments.scoring.models import OpenModel, open_checkpoints, open_model
from experiments.scoring.plans import plan_of, require_levels
from experiments.scoring.results import Targets
from experiments.scoring.score import Plan
from experiments.scoring.settings import EvaluateConfig
from experiments.scoring.texts import read_dataset, read_file


@dataclass(frozen=True)
class Inputs:
    """The models, the checkpoints of each run whose drift is measured, the text, how it is scored, and what boundaries are
    compared with."""

    models: Sequence[OpenModel]
    checkpoints: Mapping[str, Sequence[OpenModel]]
    text: Text
    plan: Plan
    targets: Targets


def read_inputs(config: EvaluateConfig) -> Inputs:
    """Everything that an evaluation needs. Raises `ConfigError`, `DataError` and `LoadError`."""
    models = [open_model(where, config.step, config.plugin) for where in config.models]
    checkpoints = {where: open_checkpoints(where, config.plugin) for where in config.models if config.drift}
    plan = plan_of(config, models, "drawn")
    asked = {"--bpe": config.bpe is not None, "--reference": config.reference is not None, "--drift": config.drift}
    require_levels(models, asked)
    text = _text(config, models)
    return Inputs(models, checkpoints, text, plan, _targets(config, text))


def _text(config: EvaluateConfig, models: Sequence[OpenModel]) -> Text:
    if config.text is not None:
        return read_file(config.text, config.bytes)
    runs = [one.config for one in models if one.config is not None]
    dataset = config.dataset or _dataset_of(models, runs)
    data = runs[0].data if runs else DataConfig()
    if runs and dataset != runs[0].dataset:
        # The texts that the run was given are not those of another data set.
        data = dataclasses.replace(data, train=None, valid=None, test=None, text_field=None)
    else:
        _require_one_split([run for run in runs if run.dataset == dataset])
    if config.text_field is not None:
        data = dataclasses.replace(data, text_field=config.text_field)
    return read_dataset(dataset, config.split, data, config.bytes)


def _dataset_of(models: Sequence[OpenModel], runs: Sequence[RunConfig]) -> str:
    """The data set that the models were trained on."""
    unknown = [one.name for one in models if one.config is None]
    require(
        len(runs) > 0,
        f"{unknown[0] if unknown else ''} does not say what it was trained on: name a --dataset or a --text",
    )
    names = {run.dataset for run in runs}
    require(
        len(names) == 1,
        f"the models were trained on different data ({', '.join(sorted(names))}): name a --dataset or a --text",
    )
    return runs[0].dataset


def _require_one_split(runs: Sequence[RunConfig]) -> None:
    """Raise `ConfigError` where the held-out text of one run may be training text of another."""
    kept = [(run.data.train, run.data.valid, run.data.test, run.data.held_out, run.data.text_field) for run in runs]
    require(
        len(set(kept)) <= 1,
        "the models were trained on different parts of their data (--data.train, valid, test, held-out, text-field): name a "
        "--text, or evaluate them apart",
    )


def _targets(config: EvaluateConfig, text: Text) -> Targets:
    cuts = []
    if config.reference is not None:
        cuts.append(("reference", read_reference(config.reference, text)))
    if config.bpe is not None:
        size = int(config.bpe) if config.bpe.isdecimal() else None
        if size is not None:
            require(size >= SMALLEST_VOCABULARY, f"--bpe {size}: a vocabulary has 256 bytes and a merge, 257 or more")
        encoding = read_encoding(config.bpe) if size is None else learn_encoding(text, size)
        name = "BPE" if size is None else f"BPE of {size:,}"
        cuts.append((name, encoding_cuts(encoding, text, config.bpe)))
    return targets_of(text, cuts)
