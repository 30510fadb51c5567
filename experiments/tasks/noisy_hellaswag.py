"""The examples of the task files in `files/noisy_hellaswag`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import datasets
from lm_eval.tasks.hellaswag.utils import process_docs

from experiments.tasks.noise import variants


def noisy(noise: str, dataset: datasets.Dataset) -> datasets.Dataset:
    """The examples of HellaSwag as the harness's task of that name makes them, each three times: with the noise in its context,
    in its endings, and in both."""

    def expanded(rows: Mapping[str, Sequence]) -> dict[str, list]:
        made: dict[str, list] = {"place": [], "query": [], "choices": [], "gold": [], "label": []}
        for query, choices, gold in zip(rows["query"], rows["choices"], rows["gold"], strict=True):
            for place, noisy_query, noisy_choices in variants(noise, query, choices):
                for name, value in zip(made, (place, noisy_query, noisy_choices, gold, str(gold)), strict=True):
                    made[name].append(value)
        return made

    clean = process_docs(dataset)
    made = clean.map(expanded, batched=True, remove_columns=clean.column_names)
    assert isinstance(made, datasets.Dataset)
    return made


antspeak = functools.partial(noisy, "antspeak")
drop = functools.partial(noisy, "drop")
randomcase = functools.partial(noisy, "randomcase")
repeat = functools.partial(noisy, "repeat")
uppercase = functools.partial(noisy, "uppercase")
