"""Labels of word ends, scores of boundaries against them, and the command `words`."""

import dataclasses
import itertools
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.rows import make_row
from estimators.routers.rules import is_whitespace
from experiments import words
from experiments.config.files import to_json
from experiments.evaluation.boundaries import analyse, bits_by_position, draw_boundaries, evaluate_placements
from experiments.evaluation.evaluate import evaluate_rows, summarise
from experiments.evaluation.segmentation import BYTE_POSITIONS, by_jieba, by_whitespace, expected_scores, label_bytes
from experiments.words import groups
from tests.compositions import config_of, registered
from tests.conftest import needs, small_model, small_score_function, text_bytes
from unet import save

TEXT = "我们学习，很好。我们在 Linux 上学习"


def by_list(text):
    """A segmenter with a list of a few words; every other character is a token."""
    known, tokens = ("我们", "学习", "Linux"), []
    while text:
        token = next((word for word in known if text.startswith(word)), text[0])
        tokens.append(token)
        text = text[len(token) :]
    return tokens


def row_of(*parts, length):
    return make_row([np.frombuffer(part, np.uint8) for part in parts], length)


def test_white_space_closes_its_token():
    assert by_whitespace(" a bc\n\nd\u3000e") == [" ", "a ", "bc\n", "\n", "d\u3000e"]
    assert by_whitespace("") == []


def test_white_space_tokens_end_where_boundaries_are_compared_with_white_space():
    text = b"\xfea b  cd\ne. \tf"
    labels = label_bytes([row_of(text, length=20)], by_whitespace)
    expected = np.asarray(is_whitespace(jnp.asarray(list(text))))
    np.testing.assert_array_equal(labels.token_ends[0, : len(text) - 1], expected[:-1])
    np.testing.assert_array_equal(np.flatnonzero(labels.counted[0]), np.arange(1, len(text) - 1))
    # Tokens with a letter in them: "a ", "b ", "cd\n", "e. ".
    np.testing.assert_array_equal(np.flatnonzero(labels.word_ends[0]), [2, 4, 8, 11])


def test_marks_of_chinese_text_cut_in_the_middle_of_characters():
    #       习  ，      我们学          next document   é  好
    first = "习，我们学".encode()[1:] + "习".encode()[:2]
    second = b"\xfe" + "a我们é。".encode()
    row = row_of(first, second, length=40)
    labels = label_bytes([row], by_list)
    # Two bytes of 习, then ， at 2-4, 我们 at 5-10, 学 at 11-13 (the last complete one), two bytes of 习; BOS at 16, a at 17,
    # 我们 at 18-23, é at 24-25, 。 at 26-28, the last.
    np.testing.assert_array_equal(np.flatnonzero(labels.counted[0]), [*range(2, 11), *range(17, 26)])
    np.testing.assert_array_equal(np.flatnonzero(labels.token_ends[0]), [4, 10, 17, 23, 25])
    np.testing.assert_array_equal(np.flatnonzero(labels.word_ends[0]), [10, 17, 23, 25])
    assert labels.positions[0, 2:14].tolist() == [1, 2, 3] * 4
    assert labels.positions[0, 17:29].tolist() == [0, 1, 2, 3, 1, 2, 3, 1, 3, 1, 2, 3]
    assert (labels.positions[0, [0, 1, 14, 15, 16, *range(29, 40)]] == -1).all()
    np.testing.assert_array_equal(np.flatnonzero(labels.at("single", "first")[0]), [2, 5, 8, 17, 18, 21, 24])
    assert BYTE_POSITIONS == ("single", "first", "middle", "last")


def test_a_segmenter_that_loses_something_is_refused():
    with pytest.raises(ValueError, match="lost or changed"):
        label_bytes([row_of(b"a b c", length=5)], str.split)


def test_jieba_knows_words():
    needs("words", "jieba")
    segment = by_jieba()
    assert segment("我们学习中文，Linux 很好") == ["我们", "学习", "中文", "，", "Linux", " ", "很", "好"]


@pytest.mark.parametrize(("count", "among", "wanted"), [(2, 5, 3), (3, 6, 1), (1, 4, 4), (4, 4, 2), (9, 4, 2)])
def test_expectations_of_uniform_boundaries_are_means_over_all_choices(count, among, wanted):
    got = expected_scores(count, among, wanted)
    count = min(count, among)
    hits = [len(set(chosen) & set(range(wanted))) for chosen in itertools.combinations(range(among), count)]
    assert got.precision == pytest.approx(np.mean([h / count for h in hits]))
    assert got.recall == pytest.approx(np.mean([h / wanted for h in hits]))
    assert got.f1 == pytest.approx(np.mean([2 * h / (count + wanted) for h in hits]))


def test_expectations_without_boundaries_or_ends_are_undefined():
    assert math.isnan(expected_scores(0, 5, 2).precision)
    assert expected_scores(0, 5, 2).f1 == 0.0
    assert math.isnan(expected_scores(2, 5, 0).recall)
    assert math.isnan(expected_scores(0, 0, 0).f1)


def kept_of(row, **actions):
    """Results as of `evaluate_rows`, with boundaries at the given positions."""
    shape = (1, len(row["bytes"]))
    kept = {name: np.isin(np.arange(shape[1]), places)[None] for name, places in actions.items()}
    free = row["mask"][None].copy()
    free[0, 0] = False
    return {
        **{name: np.zeros(shape) for name in ("log_prob", "early_log_prob", "entropy", "probs")},
        "overflow": np.zeros(1),
        "tokens": np.zeros((1, 1)),
        "bytes": row["bytes"][None].astype(np.int32),
        "free": free,
        "valid": row["mask"][None],
        "scored": free,
        **kept,
    }


def test_boundaries_of_a_tiny_text_exactly():
    row = row_of("我们，学习 a好".encode(), length=20)
    # 我们 0-5, ， 6-8, 学习 9-14, ' ' 15, a 16, 好 17-19 (the last); the byte at 0 is forced.
    labels = label_bytes([row], by_list)
    got = analyse(kept_of(row, sampled=[0, 5, 9, 14, 19], greedy=[0, 6, 7, 12]), labels)
    assert dataclasses.astuple(got.sampled.own.ends) == (2 / 3, 2 / 5, 4 / 8)
    assert dataclasses.astuple(got.sampled.own.words) == (2 / 3, 2 / 3, 4 / 6)
    assert got.sampled.own.places == {"single": 0.0, "first": 1 / 3, "middle": 0.0, "last": 2 / 3}
    assert got.sampled.own.rate == 3 / 16
    assert dataclasses.astuple(got.greedy.own.ends) == (0.0, 0.0, 0.0)
    assert got.greedy.own.places == {"single": 0.0, "first": 2 / 3, "middle": 1 / 3, "last": 0.0}
    # Sixteen counted bytes, seven ends of characters, five ends of tokens.
    assert dataclasses.astuple(got.sampled.uniform.ends) == pytest.approx((5 / 16, 3 / 16, 2 * 15 / 16 / 8))
    assert dataclasses.astuple(got.sampled.uniform_characters.ends) == pytest.approx((5 / 7, 3 / 7, 2 * 15 / 7 / 8))
    assert got.sampled.uniform_characters.places == {"single": 2 / 7, "first": 0.0, "middle": 0.0, "last": 5 / 7}
    assert got.sampled.uniform_characters.rate == 3 / 16


def test_bits_are_those_of_the_byte_that_is_predicted():
    row = row_of("a我b".encode(), length=6)
    labels = label_bytes([row], by_list)
    log_prob = np.log(2) * -np.array([[1.0, 2.0, 3.0, 4.0, 7.0, 7.0]])
    scored = np.array([[True] * 4 + [False] * 2])
    assert bits_by_position(log_prob, scored, labels) == pytest.approx(
        {"single": 4, "first": 1, "middle": 2, "last": 3}
    )
    assert math.isnan(bits_by_position(log_prob, ~scored, labels)["middle"])


def test_other_places_take_as_many_boundaries_as_the_row_had():
    allowed = np.ones((3, 8), bool)
    allowed[:, 0] = False
    preferred = np.zeros((3, 8), bool)
    preferred[:, [2, 4, 6]] = True
    got = draw_boundaries(np.array([2, 5, 0]), preferred, allowed, np.random.default_rng(0).random((3, 8)))
    assert got.sum(axis=1).tolist() == [2, 5, 0]
    assert not got[:, 0].any()
    assert not (got & ~preferred)[0].any()
    assert got[1, [2, 4, 6]].all()


@pytest.fixture(scope="module")
def drawn():
    """A small model, some rows of English, and the results of `evaluate_rows`."""
    values = np.asarray(text_bytes(5, 24), np.uint8)
    rows = [make_row([values[i, : 24 - 7 * (i % 2)]], 24) for i in range(5)]
    model = small_model(small_score_function())
    return model, rows, evaluate_rows(model, rows, batch=2, capacity=24, key=jax.random.key(0))


def test_white_space_figures_are_those_of_validation(drawn):
    _, rows, kept = drawn
    labels = label_bytes(rows, by_whitespace)
    # All free bytes but the last of each text. Validation counts the last as well.
    counted = {**kept, "free": labels.counted}
    expected = summarise(counted).whitespace
    got = analyse(kept, labels)
    assert got.sampled.own.ends == type(got.sampled.own.ends)(
        expected.sampled_precision, expected.sampled_recall, expected.sampled_f1
    )
    assert got.greedy.own.ends == type(got.greedy.own.ends)(expected.precision, expected.recall, expected.f1)
    assert got.auc_ends == expected.auc
    assert (kept["free"] & ~labels.counted).sum() == len(rows)


def test_other_placements_have_the_same_rate_and_the_own_ones_the_same_likelihood(drawn):
    model, rows, kept = drawn
    labels = label_bytes(rows, by_whitespace)
    found = evaluate_placements(model, rows, kept, labels, batch=2, seed=0)
    assert found["as it draws them"].bpb == pytest.approx(summarise(kept).bpb, rel=1e-6)
    rates = {name: one.rate for name, one in found.items() if name != "where p > 0.5"}
    assert set(rates.values()) == {found["as it draws them"].rate}
    # Each character has one byte: every position is first and last, none is in the middle.
    assert found["first bytes of characters"].bpb == found["last bytes of characters"].bpb
    assert found["uniform"].bits["single"] == pytest.approx(found["uniform"].bpb, rel=1e-5)
    assert found["middle bytes of characters"].there == 0.0
    counts = (kept["sampled"] & kept["free"]).sum(axis=1)
    most = np.minimum(counts, labels.token_ends.sum(axis=1))
    assert found["ends of tokens"].there == most.sum() / counts.sum()
    assert math.isnan(found["uniform"].there)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Files of untrained runs: two seeds of one configuration, one without a token level, one with another length."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = folder / "text.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": f"{number}{TEXT}" * 3}) for number in range(20)))
    config = dataclasses.replace(config_of("sfe"), dataset=str(corpus), length=48, batch=4)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, protocol="crop", held_out=0.3),
        evaluation=dataclasses.replace(config.evaluation, bytes=48 * 6),
    )
    flat = dataclasses.replace(config, estimator="isotropic").with_settings(isotropic={"token_level": False})
    for name, one in {
        "sfe-0": config,
        "sfe-1": dataclasses.replace(config, seed=1),
        "bytes": flat,
        "shorter": dataclasses.replace(config, length=32),
    }.items():
        (folder / name).mkdir()
        save(registered(one.estimator, one), folder / name)
        (folder / name / "config.json").write_text(to_json(one))
    return folder


def start(*arguments):
    return words.main([str(argument) for argument in arguments])


def test_the_command_leaves_tables_of_seeds_together(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(words, "open_segmenter", lambda name: by_list)
    arguments = (runs / "sfe-0", runs / "sfe-1", "--placements", "--out", tmp_path)
    assert start(*arguments) == 0
    shown = capsys.readouterr().out
    assert shown == (tmp_path / "words.md").read_text()
    assert "| `sfe`, sampled | " in shown
    assert "| as many uniform, ends of characters | " in shown
    found = json.loads((tmp_path / "words.json").read_text())
    assert found["groups"] == {"`sfe`": [str(runs / "sfe-0"), str(runs / "sfe-1")]}
    one = found["runs"][str(runs / "sfe-0")]
    assert one["sampled"]["own"]["rate"] == pytest.approx(one["sampled"]["uniform"]["rate"])
    assert sum(one["greedy"]["uniform"]["places"].values()) == pytest.approx(1.0)
    assert start(*arguments) == 2
    assert "words.md, words.json already" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "at least one folder"),
        (("sfe-0", "sfe-0"), "named once"),
        (("sfe-0", "shorter"), "different held-out text"),
        (("bytes",), "no level of tokens"),
        (("nothing",), "neither a finished run"),
        (("sfe-0", "--bytes", "0"), "--bytes must be a whole number from 1 to"),
    ],
)
def test_invalid_input_is_one_sentence(runs, capsys, arguments, message):
    given = [part if part.startswith("-") or part == "0" else runs / part for part in arguments]
    assert start(*given, "--segmenter", "whitespace") == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_missing_segmenter_says_how_to_get_it(runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    assert start(runs / "sfe-0") == 2
    assert "pip install 'caesura-lm[words]'" in " ".join(capsys.readouterr().err.split())


def test_runs_that_differ_in_more_than_the_seed_are_told_apart(tmp_path):
    config = config_of("sfe")
    other = dataclasses.replace(config, rate=0.25)
    seeds = {tmp_path / f"a-{seed}": dataclasses.replace(config, seed=seed) for seed in (0, 1)}
    assert groups(seeds) == {"`sfe`": list(seeds)}
    names = groups({**seeds, tmp_path / "b": other})
    assert names == {"`sfe` (a-0)": list(seeds), "`sfe` (b)": [tmp_path / "b"]}
    both = {tmp_path / "first" / "a-0": config, tmp_path / "last" / "a-0": other}
    assert groups(both) == {f"`sfe` ({one.parent.name}/a-0)": [one] for one in both}
