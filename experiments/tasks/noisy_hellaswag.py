"""The examples of the task files in `files/noisy_hellaswag`."""

from __future__ import annotations

import functools

import datasets
from lm_eval.tasks.hellaswag.utils import process_docs

from experiments.tasks.noise import variants


def noisy(noise: str, dataset: datasets.Dataset) -> datasets.Dataset:
    """The examples of HellaSwag as the harness's task of that name makes them, each three times: with the noise in its context,
    in its endings, and in both."""
    rows = [
        {"place": place, "query": query, "choices": choices, "label": str(document["gold"])}
        for document in map(dict, process_docs(dataset))
        for place, query, choices in variants(noise, document["query"], document["choices"])
    ]
    return datasets.Dataset.from_list(rows)


antspeak = functools.partial(noisy, "antspeak")
drop = functools.partial(noisy, "drop")
randomcase = functools.partial(noisy, "randomcase")
repeat = functools.partial(noisy, "repeat")
uppercase = functools.partial(noisy, "uppercase")
