"""Published results on tasks, beside which those of models of this library are printed.

Accuracies are percentages. The score-function paper's come from its first version, the bits per byte from the newer one; H-Net's
are of its Tables 2 to 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GOLD = "gold"
"""The measure that is no metric of the harness: mean bits per byte of the right continuation."""
NOISY = ("hellaswag_antspeak", "hellaswag_drop", "hellaswag_randomcase", "hellaswag_repeat", "hellaswag_uppercase")


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, and the task and the measure that it shows."""

    title: str
    task: str
    measure: str


@dataclass(frozen=True)
class PublishedTable:
    """The rows of a table: values for `columns`, then those of `more` (NaN where the paper has none)."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: Mapping[str, tuple[float, ...]]
    more: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(column.task for column in self.columns)


def _columns(measure: str) -> tuple[Column, ...]:
    names = {"PIQA": "piqa", "HellaSwag": "hellaswag", "ARC-Easy": "arc_easy", "LAMBADA": "lambada_openai"}
    return tuple(Column(title, task, measure) for title, task in names.items())


SFE_BITS = PublishedTable(
    "sfe-table-1",
    "Score-function paper, Table 1 (147M parameters, FineWeb): mean over examples of the right continuation's bits per byte",
    _columns(GOLD),
    {
        "uniform": (1.660, 1.306, 1.974, 1.926),
        "straight-through Gumbel": (1.737, 1.340, 2.011, 1.956),
        "H-Net DC": (1.641, 1.313, 2.000, 2.130),
        "BPE-guided": (1.589, 1.230, 2.084, 1.645),
        "SFE, no memory": (1.561, 1.199, 1.987, 1.584),
        "SFE": (1.557, 1.212, 2.016, 1.737),
    },
)
SFE_ACCURACY = PublishedTable(
    "sfe-table-1",
    "Score-function paper, Table 1 of its first version: accuracy in %",
    _columns("acc"),
    {
        "uniform": (55.9, 26.6, 30.0, 3.6),
        "straight-through Gumbel": (53.4, 26.8, 28.8, 2.9),
        "H-Net DC": (57.6, 26.7, 30.7, 2.0),
        "SFE": (56.5, 27.1, 30.8, 8.6),
    },
)
HNET_ZERO_SHOT = PublishedTable(
    "hnet-table-2",
    "H-Net, Table 2 (L: 760M, XL: 1.3B; FineWeb-Edu): accuracy in %, in columns with n by log-probability per character",
    (
        Column("LAMBADA", "lambada_openai", "acc"),
        Column("HellaSwag n", "hellaswag", "acc_norm"),
        Column("PIQA", "piqa", "acc"),
        Column("ARC-e", "arc_easy", "acc"),
        Column("ARC-c n", "arc_challenge", "acc_norm"),
        Column("Winogrande", "winogrande", "acc"),
        Column("OpenBookQA n", "openbookqa", "acc_norm"),
    ),
    {
        "L: Transformer, tokens": (45.0, 54.5, 72.3, 69.9, 36.3, 55.9, 38.8, 53.3),
        "L: LlamaByte": (37.0, 40.5, 64.7, 55.1, 26.7, 52.3, 32.4, 44.1),
        "L: LlamaByte, global": (36.4, 41.5, 65.7, 57.2, 27.1, 49.8, 32.2, 44.3),
        "L: MambaByte": (32.9, 42.0, 66.2, 55.9, 28.1, 51.7, 33.2, 44.3),
        "L: SpaceByte": (43.0, 49.0, 69.0, 63.3, 33.5, 53.3, 35.0, 49.4),
        "L: SpaceByte++": (48.0, 55.7, 71.3, 67.9, 35.4, 57.5, 39.6, 53.6),
        "L: H-Net (pool)": (43.2, 54.7, 69.7, 67.9, 34.7, 54.8, 36.4, 51.6),
        "L: H-Net (space)": (46.7, 55.9, 72.4, 68.8, 34.6, 57.6, 38.0, 53.4),
        "L: H-Net (1-stage)": (46.2, 55.5, 71.0, 68.1, 35.6, 58.6, 40.0, 53.6),
        "L: H-Net (2-stage)": (46.9, 57.4, 72.0, 71.7, 39.2, 60.4, 40.6, 55.5),
        "XL: Transformer, tokens": (48.1, 58.0, 73.1, 72.2, 37.5, 58.6, 40.8, 55.5),
        "XL: SpaceByte++": (51.3, 60.1, 72.4, 71.8, 38.0, 58.5, 40.6, 56.1),
        "XL: H-Net (space)": (50.3, 61.5, 73.6, 72.4, 40.2, 60.2, 41.8, 57.1),
        "XL: H-Net (1-stage)": (48.4, 59.5, 72.4, 73.0, 38.3, 59.2, 42.4, 56.2),
        "XL: H-Net (2-stage)": (50.5, 62.2, 73.7, 74.2, 42.2, 60.5, 44.0, 58.2),
    },
    ("mean",),
)
HNET_ROBUSTNESS = PublishedTable(
    "hnet-table-3",
    "H-Net, Table 3: accuracy by log-probability per character on disturbed HellaSwag in %, and the robustness score",
    tuple(
        Column(title, task, "acc_norm")
        for title, task in zip(("AntSpeak", "Drop", "RandomCase", "Repeat", "UpperCase"), NOISY, strict=True)
    ),
    {
        "L: Transformer, tokens": (31.1, 29.9, 27.1, 27.8, 38.9, 30.9, 20.2),
        "L: LlamaByte": (30.4, 28.1, 29.3, 27.2, 38.5, 30.7, 36.9),
        "L: LlamaByte, global": (31.1, 28.1, 29.7, 27.3, 39.0, 31.0, 36.6),
        "L: MambaByte": (29.8, 27.9, 29.9, 27.1, 39.6, 30.9, 34.5),
        "L: SpaceByte": (30.7, 29.8, 33.5, 29.5, 47.8, 34.3, 38.1),
        "L: SpaceByte++": (31.0, 30.9, 35.8, 29.3, 54.0, 36.2, 36.4),
        "L: H-Net (pool)": (30.5, 31.2, 35.4, 29.6, 53.4, 36.1, 37.3),
        "L: H-Net (space)": (30.8, 31.2, 38.6, 29.4, 54.0, 36.8, 38.2),
        "L: H-Net (1-stage)": (31.2, 31.1, 35.4, 29.9, 54.1, 36.4, 37.2),
        "L: H-Net (2-stage)": (30.8, 32.1, 39.3, 30.4, 57.1, 38.0, 39.0),
        "XL: Transformer, tokens": (31.6, 30.7, 28.0, 28.5, 43.0, 32.3, 22.2),
        "XL: SpaceByte++": (30.9, 32.1, 40.3, 30.6, 58.5, 38.5, 38.5),
        "XL: H-Net (space)": (31.2, 33.2, 41.9, 31.8, 60.7, 39.8, 40.5),
        "XL: H-Net (1-stage)": (30.9, 32.7, 39.2, 31.2, 58.4, 38.6, 39.5),
        "XL: H-Net (2-stage)": (31.1, 34.7, 44.1, 33.0, 61.7, 40.9, 42.8),
    },
    ("mean", "robustness"),
)
HNET_CHINESE = PublishedTable(
    "hnet-table-4",
    "H-Net, Table 4 (XL, Chinese): accuracy in %",
    (Column("XWinograd-zh", "xwinograd_zh", "acc"),),
    {"Transformer, tokens": (59.9,), "H-Net (space)": (62.9,), "H-Net (2-stage)": (66.3,)},
)
TABLES = (SFE_BITS, SFE_ACCURACY, HNET_ZERO_SHOT, HNET_ROBUSTNESS, HNET_CHINESE)


def with_tables(names: Sequence[str]) -> list[str]:
    """The names of tasks, each once, with the tasks of a table for its name. Robustness needs HellaSwag itself as well."""
    tasks: dict[str, None] = {}
    for name in names:
        of_table = [task for table in TABLES if table.name == name for task in table.tasks]
        before = ["hellaswag"] if name == HNET_ROBUSTNESS.name else []
        tasks |= dict.fromkeys([*before, *of_table] or [name])
    return list(tasks)
