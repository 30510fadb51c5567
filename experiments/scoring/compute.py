"""An evaluation, from its inputs to its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from experiments.evaluation.byte_scores import ByteScores, Text
from experiments.reporting.display import Display
from experiments.scoring.cache import ScoreCache
from experiments.scoring.inputs import Inputs
from experiments.scoring.models import OpenModel
from experiments.scoring.progress import progress_bar
from experiments.scoring.results import (
    DriftResult,
    Repeated,
    TextClasses,
    drift_results,
    model_result,
    pair_results,
    repeated_results,
)
from experiments.scoring.score import score_text
from experiments.scoring.settings import EvaluateConfig
from experiments.scoring.tables import Evaluation

Scorer = Callable[[OpenModel, Text], ByteScores]


def evaluation_of(
    inputs: Inputs, config: EvaluateConfig, cache: ScoreCache, display: Display
) -> tuple[Evaluation, list[ByteScores]]:
    """All results, and the scores of each model on the text."""
    repeated = repeated_text(config.repeat, inputs.plan.context)
    with progress_bar(display, _total(inputs, repeated)) as advance:

        def score(opened: OpenModel, text: Text) -> ByteScores:
            return score_text(opened, text, inputs.plan, cache, lambda bytes: advance(opened.name, bytes))

        scores = [score(opened, inputs.text) for opened in inputs.models]
        probes = [_repeated(score, opened, repeated, config.repeat) for opened in inputs.models]
        drift = [one for run, stored in inputs.checkpoints.items() for one in _drift(score, run, stored, inputs.text)]
    classes = TextClasses.of(inputs.text)
    results = [
        model_result(opened, of, inputs.text, classes, inputs.targets, probe)
        for opened, of, probe in zip(inputs.models, scores, probes, strict=True)
    ]
    pairs = pair_results(results, scores, inputs.text, config.seed)
    return Evaluation(inputs.text, inputs.plan, results, pairs, drift, config.perplexity), scores


def repeated_text(strings: Sequence[str], size: int) -> Text | None:
    """Documents of `size` - 1 bytes, or one byte, each of one string repeated; None without strings."""
    contents = [string.encode("utf-8", "surrogateescape") for string in strings]
    size = max(1, size - 1)
    documents = tuple((content * (size // len(content) + 1))[:size] for content in contents)
    return Text("repeated strings", documents) if documents else None


def _repeated(score: Scorer, opened: OpenModel, text: Text | None, strings: Sequence[str]) -> Mapping[str, Repeated]:
    return {} if text is None else repeated_results(score(opened, text), text, strings)


def _drift(score: Scorer, run: str, stored: Sequence[OpenModel], text: Text) -> list[DriftResult]:
    steps = [opened.step for opened in stored if opened.step is not None]
    return drift_results(run, steps, [score(opened, text) for opened in stored])


def _total(inputs: Inputs, repeated: Text | None) -> int:
    """Positions of everything that is scored."""

    def positions(text: Text | None) -> int:
        return 0 if text is None else text.bytes + len(text.documents)

    both = positions(inputs.text) + positions(repeated)
    stored = [opened for some in inputs.checkpoints.values() for opened in some]
    return sum(inputs.plan.passes_of(opened) * both for opened in inputs.models) + sum(
        inputs.plan.passes_of(opened) * positions(inputs.text) for opened in stored
    )
