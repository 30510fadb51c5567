"""Tasks of lm-evaluation-harness, with data on this machine."""

import importlib
import importlib.util
import io
import itertools
import json
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
from huggingface_hub import constants

from tests.conftest import needs, predict, small_model
from tests.hub_server import hub
from tests.test_run import usual_promotion as usual_promotion

needs("eval", "lm_eval")

import datasets  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

import unet  # noqa: E402
from experiments import evaluate, harness  # noqa: E402
from experiments.config.errors import ConfigError  # noqa: E402
from experiments.scoring.cache import ScoreCache  # noqa: E402
from experiments.scoring.models import OpenModel  # noqa: E402
from experiments.scoring.score import Plan  # noqa: E402
from experiments.tasks import cute, generations, likelihoods, noise, published  # noqa: E402
from experiments.tasks.arguments import ModelArguments  # noqa: E402
from experiments.tasks.generations import Generations, Style, style_of  # noqa: E402
from experiments.tasks.harness import FILES, open_tasks, register  # noqa: E402
from experiments.tasks.likelihoods import Likelihoods, Request  # noqa: E402
from experiments.tasks.model import CaesuraLM  # noqa: E402
from experiments.tasks.results import gold_place, mean_and_error, model_tasks  # noqa: E402
from tests import gemma2_reference as gemma2  # noqa: E402
from tests.compositions import registered  # noqa: E402
from tests.local_tasks import ROWS, write_tasks  # noqa: E402

NOWHERE = ScoreCache(None)
GREEDY = Plan(128, 64, "greedy")
DRAWN = Plan(128, 64, "drawn", samples=2, seed=3)


@pytest.fixture(autouse=True)
def own_caches(monkeypatch, tmp_path, tmp_path_factory):
    monkeypatch.setattr(likelihoods, "BATCH_POSITIONS", 512)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files, and models with a token level and without one."""
    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    unet.save(registered("sfe"), folder / "sfe")
    unet.save(small_model(None), folder / "bytes")
    return folder


def opened(model):
    return OpenModel("model", model, None)


def harness_model(model, plan=GREEDY, combination="mean", cache=NOWHERE):
    likelihoods, generations = Likelihoods(opened(model), plan, cache), Generations(opened(model), plan, cache)
    return CaesuraLM(likelihoods, generations, combination, 1)


def asked(kind, *arguments, task="task"):
    return Instance(kind, {}, arguments, 0, (task, 0, 1))


def without_shots(tasks):
    for task in tasks.values():
        task.set_config(key="num_fewshot", value=0)
    return tasks


# Against the harness's own backend.


def assert_same(found, expected):
    """Log-likelihoods to 1e-4, and the same of everything else."""
    for name in ("pairs", "rolling"):
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-4)
    assert (found["greedy"], found["generated"]) == (expected["greedy"], expected["generated"])
    assert found["likelihoods"].keys() == expected["likelihoods"].keys()
    for task, rows in expected["likelihoods"].items():
        for row, theirs in zip(found["likelihoods"][task], rows, strict=True):
            np.testing.assert_allclose(row, theirs, rtol=0, atol=1e-4)
    # A perplexity is the exponential of what agrees to 1e-4.
    assert found["scores"] == pytest.approx(expected["scores"], rel=1e-4)


def params_of(z):
    return {key.removeprefix("param."): z[key] for key in z.files if key.startswith("param.")}


def test_a_gemma_2_has_the_likelihoods_texts_and_scores_of_the_hf_backend(golden, folder):
    z = golden("gemma2_harness")
    model = harness_model(gemma2.from_gemma2(params_of(z)))
    tasks = without_shots(dict(open_tasks(gemma2.TASKS, [folder]).tasks))
    expected = json.loads(str(z["found"]))
    assert expected["greedy"] == [False] * len(gemma2.PAIRS) + [True] * len(gemma2.PROMPTS)
    assert_same(gemma2.findings(model, model, tasks), expected)


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "accelerate", "peft")),
    reason="the hf backend is not installed: pip install 'lm-eval[hf]'",
)
def test_the_golden_file_is_what_the_hf_backend_says(golden, folder):
    z = golden("gemma2_harness")
    tasks = without_shots(dict(open_tasks(gemma2.TASKS, [folder]).tasks))
    first, rolling = (gemma2.hf_model(params_of(z), begins=begins) for begins in (True, False))
    assert_same(gemma2.findings(first, rolling, tasks), json.loads(str(z["found"])))


# Likelihoods.


def test_a_continuation_longer_than_the_context_is_scored_in_windows_that_move_by_the_stride():
    request = Request(b"0123", bytes(range(97, 117)))
    whole = request.document
    windows = list(likelihoods.continuation_windows(0, request, 10, 4))
    assert [(one.start, one.counted, one.stop) for one in windows] == [
        (0, 4, 10),
        (4, 10, 14),
        (8, 14, 18),
        (12, 18, 22),
        (16, 22, 24),
    ]
    # Without a token level, a prediction depends on the bytes before it alone.
    model = small_model(None)
    (found,) = Likelihoods(opened(model), Plan(10, 4, "greedy"), NOWHERE).of([request])
    total = 0.0
    for window in windows:
        read = jnp.asarray(np.frombuffer(b"\xfe" + whole, np.uint8)[None, window.start : window.stop], jnp.int32)
        logits = np.asarray(jax.nn.log_softmax(predict(model, read).logits[0]))
        total += sum(logits[place - window.start, whole[place]] for place in range(window.counted, window.stop))
    assert found.log_prob == pytest.approx([total], abs=1e-4)


def test_a_context_keeps_its_end_and_a_continuation_its_whole():
    request = Request(b"a" * 30, b"bc")
    assert [(one.start, one.counted, one.stop) for one in likelihoods.continuation_windows(0, request, 10, 4)] == [
        (22, 30, 32)
    ]
    assert [(one.start, one.counted, one.stop) for one in likelihoods.continuation_windows(0, request, 32, 4)] == [
        (0, 30, 32)
    ]


def test_likelihoods_are_those_of_whole_texts_and_depend_on_nothing_else():
    model = registered("sfe")
    requests = [Request(b"so it goes,", text) for text in (b" a man", b" and then", b"")] + [
        Request(b"", "né".encode())
    ]
    found = Likelihoods(opened(model), GREEDY, NOWHERE).of(requests)
    scores = unet.score(
        model, [one.continuation for one in requests], contexts=[one.context for one in requests], key=None
    )
    for one, score in zip(found, scores, strict=True):
        assert one.log_prob == pytest.approx([score.log_prob], abs=1e-4)
        assert one.greedy.tolist() == [score.greedy]
    drawn = Likelihoods(opened(model), DRAWN, NOWHERE).of(requests)
    again = Likelihoods(opened(model), DRAWN, NOWHERE).of([Request(b"x", b"y" * 40), *reversed(requests), requests[0]])
    for one, other in zip(drawn, again[-2:0:-1], strict=True):
        np.testing.assert_allclose(one.log_prob, other.log_prob, atol=1e-5)
    assert drawn[0].log_prob[0] != drawn[0].log_prob[1]


def test_samples_are_combined_by_their_mean_or_the_mean_of_their_probabilities():
    model = registered("sfe")
    (of_samples,) = Likelihoods(opened(model), DRAWN, NOWHERE).of([Request(b"so it", b" goes")])
    requests = [asked("loglikelihood", "so it", " goes"), asked("loglikelihood", "so it", " goes", task="another")]
    for name, expected in {
        "mean": of_samples.log_prob.mean(),
        "log-mean-exp": np.log(np.exp(of_samples.log_prob).mean()),
    }.items():
        found = harness_model(model, DRAWN, name).loglikelihood(requests, disable_tqdm=True)
        assert [one for one, _ in found] == pytest.approx([expected] * 2, rel=1e-6)
    for votes, is_greedy in {(True, False): False, (True, True, False): True, (True,): True}.items():
        assert likelihoods.is_greedy(likelihoods.Likelihood(np.zeros(len(votes)), np.array(votes))) is is_greedy


def test_what_was_scored_is_not_scored_again_and_an_interruption_loses_one_chunk(monkeypatch, tmp_path):
    cache = ScoreCache(tmp_path)
    monkeypatch.setattr(likelihoods, "CHUNK", 20)
    requests = [
        asked("loglikelihood", "so it", text) for text in (" goes", " went", " is over for now, and they left", " ends")
    ]
    calls, compute = [], likelihoods.score_positions

    def interrupted(*arguments, **settings):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(arguments)
        return compute(*arguments, **settings)

    monkeypatch.setattr(likelihoods, "score_positions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        harness_model(registered("sfe"), cache=cache).loglikelihood(requests, disable_tqdm=True)
    monkeypatch.setattr(likelihoods, "score_positions", lambda *a, **s: calls.append(a) or compute(*a, **s))
    found = harness_model(registered("sfe"), cache=cache).loglikelihood(requests, disable_tqdm=True)
    assert len(calls) == 3
    monkeypatch.setattr(likelihoods, "score_positions", None)
    assert harness_model(registered("sfe"), cache=cache).loglikelihood(requests, disable_tqdm=True) == found


# Generation.


def test_texts_end_before_a_stop_string_or_at_their_limit_and_are_kept(tmp_path, monkeypatch):
    model = harness_model(registered("sfe"), cache=ScoreCache(tmp_path))
    free = unet.generate(
        registered("sfe"), "so", max_bytes=9, key=jax.random.key(0), sampling=unet.Sampling(0.0), greedy_boundaries=True
    )
    (whole,) = [text.text for text in free.texts]
    stop = whole[2:4]
    settings = {"until": [stop, ""], "max_gen_toks": 9, "do_sample": False, "temperature": 0.0}
    drawn = {"until": "zzz", "max_gen_bytes": 9, "do_sample": True, "temperature": 2.0}
    requests = [asked("generate_until", "so", one) for one in (settings, {**settings, "until": []}, drawn, drawn)]
    found = model.generate_until(requests, disable_tqdm=True)
    assert found[:2] == [whole[: whole.index(stop)], whole]
    # The same request for another time draws other bytes.
    assert len({whole, *found[2:]}) == 3
    monkeypatch.setattr(generations, "generate", None)
    again = harness_model(registered("sfe"), cache=ScoreCache(tmp_path))
    assert again.generate_until(requests, disable_tqdm=True) == found


def test_the_combinations_of_samples_share_texts_that_are_not_kept(monkeypatch):
    calls, compute = [], generations.generate
    monkeypatch.setattr(generations, "generate", lambda *a, **s: calls.append(a) or compute(*a, **s))
    likely = Likelihoods(opened(registered("sfe")), DRAWN, NOWHERE)
    texts = Generations(likely.opened, DRAWN, NOWHERE)
    found = [
        CaesuraLM(likely, texts, combination, 1).generate_until(
            [asked("generate_until", "so", {"max_gen_bytes": 9})], disable_tqdm=True
        )
        for combination in likelihoods.COMBINATIONS
    ]
    assert found[0] == found[1]
    assert len(calls) == 1


def test_a_task_says_how_it_wants_texts():
    assert style_of({}, 4) == Style((), 1024, 0.0)
    assert style_of({"until": "\n", "max_gen_toks": 8, "temperature": 0.7}, 4) == Style(("\n",), 32, 0.7)
    assert style_of({"do_sample": True, "max_new_tokens": 2, "top_p": 0.9}, 1) == Style((), 2, 1.0, top_p=0.9)
    assert style_of({"do_sample": False, "temperature": 0.7, "max_gen_bytes": 5, "num_beams": 1}, 4) == Style(
        (), 5, 0.0
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty": 2}, "sets penalty for generation, which this model does not have"),
        ({"num_beams": 4}, "wants 4 beams"),
        ({"until": [3]}, "until must be strings"),
        ({"temperature": "hot"}, "could not convert string to float"),
        ({"do_sample": True, "top_p": 7.0}, "top_p must be"),
        ({"max_gen_toks": 0}, "the limit of bytes must be"),
    ],
)
def test_what_a_model_cannot_generate_is_one_sentence(settings, message):
    with pytest.raises(ConfigError, match=message):
        style_of(settings, 4)


# What is registered, and the arguments of the harness's command line.


def test_a_model_is_made_of_the_arguments_of_the_harness(folder):
    register()
    kind = get_model("caesura")
    assert kind is CaesuraLM
    assert get_model("dummy").__name__ == "DummyLM"
    model = kind.create_from_arg_string(
        f"path={folder / 'sfe'},samples=2,combine=log-mean-exp,seed=3,context=128,keep=False",
        {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"},
    )
    requests = [asked("loglikelihood", "so it", " goes")]
    expected = harness_model(registered("sfe"), DRAWN, "log-mean-exp").loglikelihood(requests, disable_tqdm=True)
    assert model.loglikelihood(requests, disable_tqdm=True) == [(pytest.approx(expected[0][0], rel=1e-6), False)]
    assert ModelArguments.of({"path": "7", "batch_size": "4", "step": None}) == ModelArguments("7", batch_size=4)
    assert ModelArguments.of({"path": "7", "combine": None, "seed": "None", "keep": None}) == ModelArguments("7")
    batches = [one.batch for one in ModelArguments(str(folder / "sfe"), keep=False, batch_size=3).opened()]
    assert batches == [3, 3]
    assert ModelArguments(str(folder / "sfe"), keep=False).opened()[1].batch == generations.BATCH


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs the path of a model"),
        ({"path": "a", "pretrained": "b"}, "has no pretrained: it takes path, step, boundaries"),
        ({"path": "a", "samples": 0}, "samples must be a whole number from 1"),
        ({"path": "a", "combine": "max"}, "combine=max: mean or log-mean-exp"),
        ({"path": "a", "boundaries": "soft"}, "boundaries=soft: greedy or drawn"),
        ({"path": "a", "keep": "perhaps"}, "keep=perhaps: True or False"),
    ],
)
def test_arguments_that_cannot_be_are_one_sentence(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ModelArguments.of(arguments)


@pytest.fixture
def own_tasks_only(monkeypatch):
    """To look through all files of the harness would take ten seconds."""
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_path, **_: manager(include_path=include_path, include_defaults=False),
    )


@pytest.mark.usefixtures("usual_promotion", "own_tasks_only")
def test_the_command_line_of_the_harness_knows_the_model(folder, capsys):
    asked = ["--model", "caesura", "--model_args", f"path={folder / 'sfe'},context=128", "--tasks", "piqa"]
    assert harness.main([*asked, "--include_path", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "caesura ({'path': " in out
    assert "|piqa |" in out
    assert (
        harness.main(
            ["--model", "caesura", "--model_args", "path=nowhere", "--tasks", "piqa", "--include_path", str(folder)]
        )
        == 2
    )
    assert "error: there is no file or folder nowhere" in " ".join(capsys.readouterr().err.split())
    for wrong, message in {
        ("--model_args", "path=nowhere", "--model", "caesurra"): "error: lm-evaluation-harness cannot do this (",
        ("--num_fewshot", "9"): "(ValueError): Sample larger than population",
        ("--apply_chat_template",): "have no chat template: leave out --apply_chat_template",
    }.items():
        assert harness.main([*asked, "--include_path", str(folder), *wrong]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert harness.main(["--model", "caesura", "--tasks", "nothing", "--include_path", str(folder)]) == 2
    assert "error: Tasks not found: nothing: python -m experiments.harness ls tasks" in capsys.readouterr().err


# The command of this library.


def run(capsys, *arguments):
    try:
        code = evaluate.main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.split())


@pytest.mark.usefixtures("usual_promotion")
def test_the_gold_continuation_is_scored_in_bits_per_byte(folder, capsys):
    asked = (folder / "sfe", "--task-files", folder, "--context", 256, "--json", "--tasks")
    code, out, err = run(capsys, *asked, "piqa", "winogrande", "lambada_openai", "xwinograd_zh", "cute_spell")
    assert code == 0, err
    found = json.loads(out)
    assert found["plan"]["boundaries"] == "greedy"
    (model,) = found["models"]
    answers = "twist its lid.", "use a towel.", "tie the loose ends."
    expected = {
        "piqa": [
            (f"Question: {row['goal']}\nAnswer:", f" {answer}")
            for row, answer in zip(ROWS["piqa"], answers, strict=True)
        ],
        "winogrande": [
            (left + str(row[f"option{row['answer']}"]), right)
            for row in ROWS["winogrande"]
            for left, right in [str(row["sentence"]).split("_")]
        ],
        "lambada_openai": [
            (context, f" {last}")
            for row in ROWS["lambada_openai"]
            for context, _, last in [str(row["text"]).rpartition(" ")]
        ],
    }
    for task, pairs in expected.items():
        contexts, texts = zip(*pairs, strict=True)
        scores = unet.score(registered("sfe"), texts, contexts=contexts, key=None)
        bits = [-one.log_prob / math.log(2) / one.bytes for one in scores]
        gold = model["tasks"][task]["values"]["gold"]
        assert gold["value"] == pytest.approx(np.mean(bits), rel=1e-5)
        assert gold["error"] == pytest.approx(np.std(bits, ddof=1) / math.sqrt(len(bits)), rel=1e-4)
        assert model["tasks"][task]["examples"] == len(pairs)
    piqa = model["tasks"]["piqa"]
    assert piqa["source"] == str(folder / "piqa.yaml")
    assert piqa["shots"] == 0
    assert set(piqa["values"]) == {"acc", "acc_norm", "gold"}
    # One example has no standard error, and generated answers have no right continuation.
    assert model["tasks"]["xwinograd_zh"]["values"]["gold"]["error"] is None
    assert set(model["tasks"]["cute_spell"]["values"]) == {"acc"}


@pytest.mark.usefixtures("usual_promotion")
def test_published_results_stand_beside_ours_and_the_combinations_of_samples_apart(folder, capsys):
    asked = (folder / "sfe", "--tasks", "hellaswag", "noisy_hellaswag", "--task-files", folder, "--context", 32)
    code, out, err = run(capsys, *asked, "--samples", 2, "--limit", 6, "--shots", 0)
    assert code == 0, err
    for title, width in (("Score-function paper, Table 1 (", 6), ("H-Net, Table 2", 10), ("H-Net, Table 3", 9)):
        lines = out[out.index(title) :].split("\n\n")[1].splitlines()
        assert [line.count("|") for line in lines] == [width] * len(lines)
        assert [line.partition("`, ")[2].partition(" |")[0] for line in lines[2:4]] == ["mean", "log-mean-exp"]
        assert sum("published: " in line for line in lines) >= 6
    assert "| noisy_hellaswag | acc_norm |" in out
    assert "| hellaswag_drop | 6 | 0 | acc |" in out
    assert "2 samples; the first 6 examples of each task" in out
    assert "H-Net, Table 4" not in out


def test_a_table_names_its_tasks_once():
    assert published.with_tables(["piqa", "sfe-table-1", "piqa"]) == ["piqa", "hellaswag", "arc_easy", "lambada_openai"]
    assert published.with_tables(["hnet-table-3"]) == ["hellaswag", *published.NOISY]
    assert len(published.with_tables(["hnet-table-2", "hnet-table-4"])) == 8


def test_published_rows_have_the_means_that_the_papers_print():
    for table in (published.HNET_ZERO_SHOT, published.HNET_ROBUSTNESS):
        for name, values in table.rows.items():
            count = len(table.columns)
            assert len(values) == count + len(table.more)
            assert np.mean(values[:count]) == pytest.approx(values[count], abs=0.13), name
    for table in (published.SFE_BITS, published.SFE_ACCURACY):
        assert {len(values) for values in table.rows.values()} == {4}
    clean = {name: values[1] for name, values in published.HNET_ZERO_SHOT.rows.items()}
    for name, values in published.HNET_ROBUSTNESS.rows.items():
        # One row of the paper is 1 off from its own columns.
        assert noise.robustness(values[5] / 100, clean[name] / 100) == pytest.approx(values[6], abs=1.2)


# Noise.


def test_noises_are_what_they_are_called():
    text = "So it goes, again and again, until the end."
    assert noise.disturbed("antspeak", "ab é") == "A B   É"
    assert noise.disturbed("uppercase", "ab é") == "AB É"
    rng = random.Random(5)
    shorter = noise.drop(text, rng)
    assert len(text) - len(shorter) == 4
    rest = iter(text)
    assert all(any(one == other for other in rest) for one in shorter)
    mixed = noise.random_case("abcdefgh" * 5, rng)
    assert mixed.lower() == "abcdefgh" * 5
    assert sum(one.isupper() for one in mixed) == 20
    runs = [len(list(run)) for _, run in itertools.groupby(noise.repeat("abcdefghij" * 5, rng))]
    assert len(runs) == 50
    assert sum(length > 1 for length in runs) == 10
    assert max(runs) <= 4
    for name in noise.NOISES:
        assert noise.disturbed(name, text) == noise.disturbed(name, text) != text
        assert noise.disturbed(name, "") == ""
    assert noise.disturbed("drop", text) != noise.drop(text, random.Random(1))
    places = noise.variants("uppercase", "a", ["b", "c"])
    assert places == [("context", "A", ["b", "c"]), ("endings", "a", ["B", "C"]), ("both", "A", ["B", "C"])]


def test_every_task_file_is_found_and_names_functions_that_are_there():
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=FILES)
    files = {name: entry.cfg or {} for name, entry in manager.task_index.items()}
    groups = {name: files[name]["task"] for name in ("cute", "noisy_hellaswag")}
    assert {name: len(members) for name, members in groups.items()} == {"cute": 14, "noisy_hellaswag": 5}
    assert files.keys() == {*groups, *itertools.chain(*groups.values())}
    # Or the harness would disturb a whole training split at every start.
    assert "\ntraining_split: null\n" in (FILES / "noisy_hellaswag" / "common.yaml").read_text()
    assert tuple(groups["noisy_hellaswag"]) == published.NOISY
    splits = set()
    for name in groups["cute"]:
        module, _, function = files[name]["process_results"].rpartition("/")[2].rpartition(".")
        assert callable(getattr(importlib.import_module(module), function))
        # Case matters in tasks on characters only.
        assert (function == "same_words") == name.endswith("_word")
        splits.add(files[name]["test_split"])
    assert splits == {name.removeprefix("cute_") for name in groups["cute"]}
    assert [cute.same({"answer": "No"}, [text])["acc"] for text in (" No ", "no", "")] == [1, 0, 0]
    assert [cute.same_words({"answer": "No"}, [text])["acc"] for text in (" No ", "no", "")] == [1, 1, 0]


def test_robustness_is_the_part_of_what_is_above_chance_that_is_left():
    assert noise.robustness(0.35, 0.45) == pytest.approx(50)
    assert noise.robustness(0.2, 0.45) == pytest.approx(-25)
    assert math.isnan(noise.robustness(0.3, 0.25))


def test_an_answer_that_is_no_choice_is_counted(folder):
    task = open_tasks(["piqa"], [folder]).tasks["piqa"]
    sample = {"doc": {**ROWS["piqa"][0], "label": 7}, "target": 7, "doc_id": 4}
    assert gold_place(task, sample) is None
    assert gold_place(task, sample | {"target": np.int64(1)}) == 1


def test_errors_are_those_of_each_filter_and_gold_counts_examples_once(folder):
    task = open_tasks(["piqa"], [folder]).tasks["piqa"]
    requests = [("Q: é", " aa"), ("Q: é", " b")]
    samples = [
        {
            "doc": ROWS["piqa"][0],
            "doc_id": number,
            "target": place,
            "filter": name,
            "acc": float(right),
            "arguments": requests,
            "filtered_resps": [(-3.0 * math.log(2), False), (-4.0 * math.log(2), False)],
        }
        for name in ("first", "second")
        for number, (place, right) in enumerate([(0, 1), (1, 0), (7, name == "second")])
    ]
    found = {
        "samples": {"piqa": samples},
        "results": {"piqa": {"acc,first": 1 / 3, "acc_stderr,first": "N/A", "acc,second": 2 / 3}},
        "configs": {"piqa": {}},
        "n-shot": {"piqa": 0},
    }
    opened = OpenModel("m", small_model(None), None)
    result = model_tasks(opened, None, 8, {"piqa": task}, found).tasks["piqa"]
    assert (result.examples, result.cut, result.without_gold) == (3, 0, 1)
    assert result.values["acc (first)"] == mean_and_error([1.0, 0.0, 0.0])
    assert result.values["acc (second)"] == mean_and_error([1.0, 0.0, 1.0])
    # " aa" has 3 bytes and 3 bits, " b" has 2 bytes and 4 bits.
    assert result.values["gold"].value == pytest.approx((1.0 + 2.0) / 2)
    assert model_tasks(opened, None, 7, {"piqa": task}, found).tasks["piqa"].cut == 3


# Data sets of the hub, through the real client.


def parquet(rows):
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), content)
    return content.getvalue()


def repository(config, splits, rows):
    """The files of a data set as the hub has them, with the same rows in every split."""
    folder = "data" if config == "default" else config
    paths = "".join(f"  - split: {split}\n    path: {folder}/{split}-*\n" for split in splits)
    card = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{paths}---\n# A data set\n"
    files = {f"{folder}/{split}-00000-of-00001.parquet": parquet(rows) for split in splits}
    return {"README.md": card.encode(), **files}


@pytest.fixture
def fresh_client(monkeypatch, tmp_path):
    """A client of the hub with nothing in its cache, which does not wait between its attempts."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "data")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)

    def at(url):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")

    return at


@pytest.mark.usefixtures("usual_promotion")
def test_data_sets_of_the_hub_are_read_in_their_real_layout(folder, tmp_path, capsys, fresh_client):
    files = repository("default", ("train", "validation"), ROWS["hellaswag"])
    more = {"allenai/ai2_arc": repository("ARC-Easy", ("train", "validation", "test"), ROWS["arc_easy"])}
    asked = (folder / "sfe", "--tasks", "hellaswag", "hellaswag_uppercase", "arc_easy", "--context", 64, "--json")
    with hub("Rowan/hellaswag", files, more=more) as server:
        fresh_client(server.url)
        code, out, err = run(capsys, *asked)
    assert code == 0, err
    found = json.loads(out)["models"][0]["tasks"]
    assert {task: result["examples"] for task, result in found.items()} == {
        "hellaswag": 2,
        "hellaswag_uppercase": 6,
        "arc_easy": 2,
    }
    code, out, err = run(capsys, *asked, "--task-files", folder)
    local = json.loads(out)["models"][0]["tasks"]
    assert {task: result["values"] for task, result in local.items()} == {
        task: result["values"] for task, result in found.items()
    }


@pytest.mark.usefixtures("usual_promotion")
def test_a_hub_that_cannot_be_reached_is_one_sentence(folder, capsys, fresh_client):
    with hub("Rowan/hellaswag", {}) as server:
        url = server.url
    fresh_client(url)
    code, out, err = run(capsys, folder / "sfe", "--tasks", "hellaswag")
    assert (code, out) == (2, "")
    assert err.startswith(
        "error: the data of the task hellaswag cannot be had: Couldn't reach 'Rowan/hellaswag' on the Hub"
    )
    assert f"(the hub is {url}); what was loaded before needs no network (HF_HUB_OFFLINE=1)" in err
    assert err.count("error") == 1


# What cannot be had.


@pytest.mark.usefixtures("usual_promotion", "own_tasks_only")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "nothing"), "there is no task called nothing in lm-evaluation-harness, nor in"),
        (("--tasks", "piqa", "--task-files", "nowhere"), "--task-files nowhere is not a folder"),
        (("--tasks", "broken"), "the task broken cannot be used ("),
        (("--tasks", "gone"), "the data of the task gone cannot be had: Unable to find"),
        (("--tasks", "odd"), "example 0 of the task odd holds half a surrogate pair at character 1"),
        (
            ("--tasks", "piqa", "--shots", 9),
            "the prompts of the task piqa cannot be written (ValueError): Sample larger than",
        ),
        (("--tasks", "raises"), "the answers of the task raises cannot be judged (KeyError): 'answers'"),
        (("--tasks", "piqa", "beams"), "the task beams cannot be used: a task wants 4 beams"),
        (("--tasks", "piqa", "--dataset", "docs", "--bytes", 9), "leave out --dataset, --bytes"),
        (("--shots", 2), "name the --tasks that --shots is for"),
        (("--tasks", "piqa", "--boundaries", "greedy", "--samples", 2), "leave out --boundaries greedy"),
        (("--tasks", "piqa", "--limit", 0), "--limit must be a whole number from 1"),
    ],
)
def test_bad_input_is_one_sentence(folder, tmp_path, capsys, arguments, message):
    files = tmp_path / "files"
    write_tasks(files)
    (files / "broken.yaml").write_text("task: broken\noutput_type: none\n")
    (files / "gone.yaml").write_text(
        f"include: {files / 'piqa.yaml'}\ntask: gone\ndataset_kwargs: {{data_files: none.jsonl}}\n"
    )
    spell = f"include: {files / 'cute_spell.yaml'}\n"
    (files / "beams.yaml").write_text(f"{spell}task: beams\ngeneration_kwargs: {{num_beams: 4}}\n")
    (files / "judge.py").write_text("def judge(document, results):\n    return {'acc': document['answers']}\n")
    (files / "raises.yaml").write_text(
        f"{spell}task: raises\nprocess_results: !function judge.judge\ngeneration_kwargs: {{max_gen_bytes: 2}}\n"
    )
    odd = """doc_to_text: '{{"a\\ud800b"}}'"""  # as jinja spells it
    (files / "odd.yaml").write_text(f"include: {files / 'lambada_openai.yaml'}\ntask: odd\n{odd}\n")
    given = arguments if "--tasks" not in arguments or "nowhere" in arguments else (*arguments, "--task-files", files)
    code, out, err = run(capsys, folder / "sfe", *given)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.usefixtures("usual_promotion")
def test_without_the_extra_there_is_one_sentence(folder, capsys, monkeypatch):
    usual = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else usual(name, *rest)
    )
    for code in (
        run(capsys, folder / "sfe", "--tasks", "piqa"),
        (harness.main(["--tasks", "piqa"]), "", capsys.readouterr().err),
    ):
        assert code[:2] == (2, "")
        assert "tasks need lm-evaluation-harness, which is not installed: pip install 'caesura-lm[eval]'" in " ".join(
            code[2].split()
        )


@pytest.mark.usefixtures("usual_promotion")
def test_samples_of_a_model_without_boundaries_are_refused(folder, capsys):
    code, _, err = run(capsys, folder / "bytes", "--tasks", "piqa", "--task-files", folder, "--samples", 2)
    assert (code, "has no level of tokens and so no boundaries: leave out --samples" in err) == (2, True)
