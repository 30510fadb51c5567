"""Task files of lm-evaluation-harness with data on this machine: the real schemas, sentences of our own."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval.tasks

from experiments.tasks.harness import FILES


def _choices(*texts: str) -> dict[str, list[str]]:
    return {"text": list(texts), "label": [chr(65 + place) for place in range(len(texts))]}


def _scene(number: int, label: str, context: str, endings: list[str]) -> dict[str, object]:
    return {
        "ind": number,
        "activity_label": "Cleaning windows",
        "ctx_a": context,
        "ctx_b": "she",
        "ctx": f"{context} she",
        "endings": endings,
        "source_id": f"activitynet~{number}",
        "split": "val",
        "split_type": "indomain",
        "label": label,
    }


ROWS: dict[str, list[dict[str, object]]] = {
    "piqa": [
        {"goal": "To open a jar,", "sol1": "twist its lid.", "sol2": "boil its label for an hour.", "label": 0},
        {"goal": "To dry your hands,", "sol1": "hold them under water.", "sol2": "use a towel.", "label": 1},
        {"goal": "To mend a net,", "sol1": "tie the loose ends.", "sol2": "cut it up.", "label": 0},
    ],
    "hellaswag": [
        _scene(1, "0", "A woman holds a sponge.", ["wipes the glass.", "[title] eats it.", "sings.", "goes to sleep."]),
        _scene(2, "3", "A bucket stands by the door.", ["flies off.", "paints it red.", "is a fish.", "fills it."]),
    ],
    "arc_easy": [
        {
            "id": "a1",
            "question": "Which of these gives light?",
            "choices": _choices("a stone", "the sun", "a spoon"),
            "answerKey": "B",
        },
        {"id": "a2", "question": "What do bees make?", "choices": _choices("honey", "iron"), "answerKey": "A"},
    ],
    "winogrande": [
        {
            "sentence": "The cup did not fit in the box because the _ was too large.",
            "option1": "cup",
            "option2": "box",
            "answer": "1",
        },
        {"sentence": "Ann thanked Mary because _ had helped.", "option1": "Ann", "option2": "Mary", "answer": "2"},
    ],
    "openbookqa": [
        {
            "id": "o1",
            "question_stem": "Ice becomes water when it is",
            "choices": _choices("heated", "painted"),
            "answerKey": "A",
        },
    ],
    "lambada_openai": [
        {"text": "She whistled for her dog, and over the hill came the dog"},
        {"text": "Il aime le café, et l'après-midi il va au café"},
    ],
    "xwinograd_zh": [
        {"sentence": "杯子放不进盒子，因为_太大了。", "option1": "杯子", "option2": "盒子", "answer": "1"},
    ],
    "cute_spell": [
        {"prompt": 'Spell out the word.\n\nQuestion: Spell out the word "cat".', "answer": "c a t"},
        {"prompt": 'Spell out the word.\n\nQuestion: Spell out the word "tree".', "answer": "t r e e"},
    ],
}
"""Examples by task."""
HARNESS = {
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "winogrande": "winogrande/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "xwinograd_zh": "xwinograd/xwinograd_zh.yaml",
}
"""The harness's own files, from which everything but the place of the data is taken."""
SPLITS = {
    "lambada_openai": "test",
    "xwinograd_zh": "test",
    "arc_easy": "test",
    "openbookqa": "test",
    "cute_spell": "spell",
}


def write_tasks(folder: Path) -> Path:
    """Write a task file and the data of each task, and of noisy HellaSwag, there."""
    folder.mkdir(parents=True, exist_ok=True)
    there = Path(lm_eval.tasks.__file__).parent
    noisy = sorted((FILES / "noisy_hellaswag").glob("hellaswag_*.yaml"))
    files = {name: there / path for name, path in HARNESS.items()} | {path.stem: path for path in noisy}
    files["cute_spell"] = FILES / "cute" / "cute_spell.yaml"
    for name, path in files.items():
        data = folder / f"{'hellaswag' if path in noisy else name}.jsonl"
        if name in ROWS:
            data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[name]))
        split = SPLITS.get(name, "validation")
        lines = [
            f"include: {path}",
            f"task: {name}",
            "dataset_path: json",
            "dataset_name: null",
            "training_split: null",
            *(["validation_split: null"] if split != "validation" else []),
            f"{'test' if split != 'validation' else 'validation'}_split: {split}",
            f"dataset_kwargs: {{data_files: {{{split}: '{data}'}}}}",
        ]
        (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    return folder
