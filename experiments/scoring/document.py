"""The results of an evaluation as one JSON object."""

from __future__ import annotations

import dataclasses

from experiments.evaluation.measures import LONGEST
from experiments.scoring.results import ModelResult
from experiments.scoring.settings import EvaluateConfig
from experiments.scoring.tables import Evaluation


def document(evaluation: Evaluation, config: EvaluateConfig) -> dict[str, object]:
    """The content of `evaluation.json`, and of `--json`: `docs/evaluation.md` says what the values mean."""
    text = evaluation.text
    return {
        "settings": {name: value for name, value in vars(config).items() if name not in ("json", "report", "per_byte")},
        "text": {
            "name": text.name,
            "sha256": text.fingerprint,
            "bytes": text.bytes,
            "documents": len(text.documents),
            "document_bytes": text.sizes.tolist(),
        },
        "plan": dataclasses.asdict(evaluation.plan),
        "models": [_model(one, perplexity=evaluation.perplexity) for one in evaluation.models],
        "pairs": [dataclasses.asdict(one) for one in evaluation.pairs],
        "drift": [dataclasses.asdict(one) for one in evaluation.drift],
    }


def _model(result: ModelResult, *, perplexity: bool) -> dict[str, object]:
    values = dataclasses.asdict(result)
    likelihood = values.pop("likelihood")
    likelihood["document_nats"] = likelihood["document_nats"].tolist()
    if values["boundaries"] is not None:
        # The last number of the histogram is of all longer chunks.
        values["boundaries"]["chunks"]["histogram_ends_at"] = LONGEST
    if perplexity:
        likelihood["perplexity"] = 2.0 ** likelihood["bpb"]
    return {**values, **likelihood}
