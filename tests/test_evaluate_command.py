"""The command that evaluates models on a text."""

import dataclasses
import json

import equinox as eqx
import jax
import numpy as np
import pyarrow.parquet
import pytest

import unet
from experiments.config.files import to_json
from experiments.config.sections import DataConfig
from experiments.evaluate import main
from experiments.scoring import score as scoring
from experiments.scoring.models import OpenModel, open_model
from experiments.scoring.texts import read_dataset, read_file
from experiments.training.checkpoint import Checkpoints, Progress
from experiments.training.trainer import Trainer
from tests.compositions import config_of, registered
from tests.conftest import small_model
from tests.test_run import usual_promotion as usual_promotion
from unet.files.hnet_layout import from_reference

DOCUMENTS = ["so it goes, a man ", "né, and then", "a b c", "the end of it all."]
WINDOWS = ("--context", 16, "--stride", 8, "--repeat", "a", "--seed", 3)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch, tmp_path):
    monkeypatch.setattr(scoring, "BATCH_POSITIONS", 64)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models with a token level and without one, and a text."""
    root = tmp_path_factory.mktemp("models")
    unet.save(registered("sfe"), root / "sfe")
    unet.save(registered("uniform"), root / "uniform")
    unet.save(small_model(None), root / "bytes")
    (root / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    (root / "cuts.jsonl").write_text("[2, 6]\n[0, 4]\n[5]\n[1, 2, 3]\n")
    return root


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.split())


def evaluated(capsys, folders, *arguments, models=("sfe",)):
    asked = [*(folders / name for name in models), "--dataset", folders / "text.jsonl", "--split", "all", "--json"]
    code, out, err = run(capsys, *asked, *WINDOWS, *arguments)
    assert code == 0, err
    # JSON has no NaN.
    return json.loads(out, parse_constant=lambda name: pytest.fail(name))


def test_the_json_has_what_scores_of_whole_documents_give(folders, capsys):
    found = evaluated(capsys, folders, "--context", 32, "--stride", 32)
    model, contents = registered("sfe"), [text.encode() for text in DOCUMENTS]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(jax.random.key(3), 0), np.arange(4))
    scores = unet.score(model, contents, key=keys)
    (got,) = found["models"]
    np.testing.assert_allclose(got["document_nats"], [-one.log_prob for one in scores], rtol=1e-5)
    size = sum(map(len, contents))
    assert got["bpb"] == pytest.approx(-sum(one.log_prob for one in scores) / np.log(2) / size, rel=1e-5)
    assert got["boundaries"]["rate"] == pytest.approx(sum(one.boundaries.sum() for one in scores) / size)
    assert got["boundaries"]["bytes_per_token"] == [pytest.approx(1 / got["boundaries"]["rate"])]
    assert found["text"]["bytes"] == size
    assert found["text"]["document_bytes"] == list(map(len, contents))
    assert got["early_bpb"] > 0
    assert got["bpb_error"] > 0


def test_tables_go_to_standard_output_and_everything_else_elsewhere(folders, capsys, tmp_path):
    cuts = folders / "cuts.jsonl"
    arguments = (
        "--reference",
        cuts,
        "--bpe",
        300,
        "--report",
        tmp_path / "page",
        "--per-byte",
        tmp_path / "all.parquet",
    )
    asked = [folders / "sfe", folders / "uniform", "--dataset", folders / "text.jsonl", "--split", "all", *arguments]
    code, out, err = run(capsys, *asked, *WINDOWS, "--samples", 2, "--perplexity")
    assert code == 0, err
    tables = [line for line in out.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables if f"`{folders / 'sfe'}` −" in line} == {4}
    for name in ("white space", "spacelike", "reference: first bytes", "BPE of 300: last bytes", "Latin", "letter"):
        assert f" {name} |" in out
    assert "mean of 2 samples" in out
    assert "see" in err
    page = (tmp_path / "page" / "report.html").read_text()
    assert page.count("<pre") == 2
    assert (tmp_path / "page" / "evaluation.png").read_bytes()[:4] == b"\x89PNG"
    models = json.loads((tmp_path / "page" / "evaluation.json").read_text())["models"]
    assert len(models) == 2
    assert all(model["perplexity"] == pytest.approx(2 ** model["bpb"]) for model in models)
    assert "| bits per byte | perplexity per byte | early exit |" in out
    assert f"| {models[0]['perplexity']:.4f} |" in out
    rows = pyarrow.parquet.read_table(tmp_path / "all.parquet").to_pydict()
    size = len("".join(DOCUMENTS).encode())
    assert len(rows["byte"]) == 2 * 2 * size
    assert bytes(rows["byte"][:size]) == "".join(DOCUMENTS).encode()
    assert rows["sample"][size] == 1
    assert rows["boundary_1"] == [depth > 0 for depth in rows["boundary_depth"]]
    # Another evaluation does not replace the page without being told to.
    code, _, err = run(capsys, *asked, *WINDOWS)
    assert (code, "exists: replace it (--overwrite)" in err) == (2, True)


def test_what_was_computed_is_not_computed_again(folders, capsys, monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", 20)
    first = evaluated(capsys, folders)
    monkeypatch.setattr(scoring, "score_windows", None)
    assert evaluated(capsys, folders) == first


def test_an_interrupted_evaluation_goes_on_where_it_was(folders, capsys, monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", 20)
    done, compute = [], scoring.score_windows

    def interrupted(*arguments, **settings):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments)
        return compute(*arguments, **settings)

    monkeypatch.setattr(scoring, "score_windows", interrupted)
    asked = (folders / "sfe", "--dataset", folders / "text.jsonl", "--split", "all", "--json", *WINDOWS)
    assert run(capsys, *asked)[:2] == (130, "")
    rest = []
    monkeypatch.setattr(scoring, "score_windows", lambda *a, **s: rest.append(a) or compute(*a, **s))
    resumed = evaluated(capsys, folders)
    # The text is in three chunks, and the repeated string in one.
    assert (len(done), len(rest)) == (2, 2)
    assert evaluated(capsys, folders, "--no-keep")["models"][0]["bpb"] == resumed["models"][0]["bpb"]


def test_a_damaged_file_of_the_cache_is_computed_again(folders, capsys, tmp_path):
    first = evaluated(capsys, folders)
    for path in (tmp_path / "cache" / "caesura" / "evaluation").glob("*.npz"):
        path.write_bytes(path.read_bytes()[:50])
    assert evaluated(capsys, folders) == first


def test_models_are_compared_document_by_document(folders, capsys):
    found = evaluated(capsys, folders, models=("sfe", "uniform", "bytes"))
    sizes = np.array(found["text"]["document_bytes"])
    nats = [np.array(one["document_nats"]) for one in found["models"]]
    assert [pair["first"].rpartition("/")[2] for pair in found["pairs"]] == ["sfe", "sfe", "uniform"]
    pair = found["pairs"][0]["difference"]
    assert pair["mean"] == pytest.approx((nats[0] - nats[1]).sum() / np.log(2) / sizes.sum())
    assert pair["low"] < pair["mean"] < pair["high"]
    assert found["models"][2]["boundaries"] is None
    assert found["pairs"][1]["change"] is None
    assert 0 < found["pairs"][0]["change"]["changed"] <= 1


def test_samples_give_a_mean_and_the_mean_of_probabilities(folders, capsys):
    one, two = (evaluated(capsys, folders, "--samples", count)["models"][0] for count in (1, 2))
    assert one["mixture_bpb"] == pytest.approx(one["bpb"])
    assert two["mixture_bpb"] < two["bpb"]
    assert two["bpb"] != one["bpb"]


def test_a_text_that_ends_within_a_character_is_evaluated(folders, capsys, tmp_path):
    path = tmp_path / "cut.txt"
    path.write_bytes("a b né".encode()[:-1] + b"\xe2\x82")
    code, out, _ = run(capsys, folders / "sfe", "--text", path, "--json", "--bpe", 257, *WINDOWS)
    assert code == 0
    assert json.loads(out)["text"]["bytes"] == 8
    # The standard error over one document is undefined.
    assert json.loads(out)["models"][0]["bpb_error"] is None


def test_the_name_of_a_text_says_how_much_of_it_was_left(folders, tmp_path):
    path = folders / "text.jsonl"
    whole = read_dataset(str(path), "all", DataConfig(), None)
    assert (whole.name, len(whole.documents)) == (str(path), 4)
    assert read_dataset(str(path), "all", DataConfig(), whole.bytes).name == str(path)
    part = read_dataset(str(path), "all", DataConfig(), 20)
    assert part.documents == (DOCUMENTS[0].encode(), "né".encode()[:2])
    assert part.name == f"{path}, first 20 bytes"
    split = [read_dataset(str(path), one, DataConfig(held_out=0.5), None) for one in ("held-out", "training")]
    assert sorted(split[0].documents + split[1].documents) == sorted(whole.documents)
    (tmp_path / "a.txt").write_bytes(b"abc")
    names = [read_file(tmp_path / "a.txt", most).name for most in (None, 3, 2)]
    assert names == [f"{tmp_path / 'a.txt'}", f"{tmp_path / 'a.txt'}", f"{tmp_path / 'a.txt'}, first 2 bytes"]


def test_models_are_opened_from_folders_and_files_of_either_layout(folders, golden, tmp_path):
    (folder, file) = (open_model(str(folders / "sfe" / name)) for name in ("", "model.safetensors"))
    assert folder.digest == file.digest != open_model(str(folders / "uniform")).digest
    arrays = golden("hnet_1stage")
    params = {key[6:]: arrays[key] for key in arrays.files if key.startswith("param.")}
    published = from_reference(json.loads(str(arrays["config"])), params)
    path = unet.save_hnet(published, tmp_path)
    for where in (path, path.parent):
        opened = open_model(str(where))
        assert opened.digest == OpenModel("", published, None).digest
        assert (opened.levels, opened.config, opened.step) == (1, None, None)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A run with checkpoints of two models, and no other."""
    folder = tmp_path_factory.mktemp("run") / "unfinished"
    folder.mkdir()
    config = dataclasses.replace(config_of("sfe"), length=24, batch=2, dataset="docs")
    (folder / "config.json").write_text(to_json(config))
    checkpoints = Checkpoints(folder / "checkpoints", keep=2)
    model = registered("sfe", config)
    with jax.numpy_dtype_promotion("standard"):
        trainer = Trainer.of(config, model, (24,))
        for step in (3, 5):
            state = trainer.first_state()
            params = jax.tree.map(lambda leaf, step=step: leaf * (step / 5), state.params)
            state = eqx.tree_at(lambda state: state.params, state, params)
            checkpoints.save(state, Progress(step, 1.0, {}, "none"))
    checkpoints.close()
    return folder


def test_the_newest_checkpoint_of_an_unfinished_run_is_its_model(folders, unfinished, capsys):
    before = sorted(path.name for path in unfinished.rglob("*"))
    asked = (unfinished, folders / "sfe", "--dataset", folders / "text.jsonl", "--split", "all", "--json", *WINDOWS)
    code, out, err = run(capsys, *asked)
    assert code == 0, err
    newest, same = json.loads(out)["models"]
    assert (newest["step"], newest["bpb"]) == (5, pytest.approx(same["bpb"], rel=1e-6))
    # The same model, so that its scores are kept once.
    assert newest["digest"] == same["digest"] != open_model(str(unfinished), 3).digest
    (drift,) = json.loads(run(capsys, unfinished, *asked[2:], "--drift")[1])["drift"]
    assert (drift["earlier"], drift["later"]) == (3, 5)
    assert 0 <= drift["change"]["bytes"] < 1
    assert sorted(path.name for path in unfinished.rglob("*")) == before


def test_a_damaged_checkpoint_is_named(unfinished, tmp_path, capsys):
    copied = tmp_path / "run"
    copied.mkdir()
    for path in unfinished.rglob("*"):
        target = copied / path.relative_to(unfinished)
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    for path in (copied / "checkpoints" / "5" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:100])
    code, out, err = run(capsys, copied, *WINDOWS)
    assert (code, out) == (2, "")
    assert "checkpoints/5 is damaged" in err.replace("checkpoints/ 5", "checkpoints/5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("MODEL/none",), "there is no file or folder"),
        ((".",), "holds neither a run nor the weights of a model"),
        (("MODEL/sfe",), "does not say what it was trained on: name a --dataset or a --text"),
        (("MODEL/sfe", "--dataset", "nowhere"), "no data set, file or folder called 'nowhere'"),
        (("MODEL/sfe", "--dataset", "docs", "--split", "test"), "has no settled test text"),
        (("MODEL/sfe", "--text", "nowhere.txt"), "nowhere.txt cannot be read: No such file"),
        (("MODEL/sfe", "--text", "EMPTY"), "is empty"),
        (("MODEL/sfe", "--text", "BOS"), "holds the byte 254 at offset 1"),
        (("MODEL/sfe", "TEXT", "--context", 8, "--stride", 9), "windows would leave bytes out"),
        (("MODEL/sfe", "TEXT", "--step", 4), "--step 4 names a checkpoint of a run, but"),
        (("MODEL/sfe", "TEXT", "--drift"), "holds 0: keep more of them in training"),
        (("MODEL/bytes", "TEXT", "--bpe", 300), "has no level of tokens and so no boundaries: leave out --bpe"),
        (("MODEL/bytes", "TEXT", "--boundaries", "greedy"), "leave out --boundaries"),
        (("MODEL/sfe", "TEXT", "--bpe", 256), "257 or more"),
        (("MODEL/sfe", "TEXT", "--bpe", "none.json"), "neither a number of tokens to learn nor a tokenizer.json"),
        (("MODEL/sfe", "TEXT", "--bpe", "EMPTY"), "is not the tokenizer.json of a tokenizer"),
        (("MODEL/sfe", "TEXT", "--bpe", "WORDS"), "does not cover the bytes of document 0"),
        (("MODEL/sfe", "TEXT", "--reference", "EMPTY"), "has 0 lines, but the text has 4 documents"),
        (("MODEL/sfe", "TEXT", "--reference", "FAR"), "line 3, has an offset outside its document, which has 5 bytes"),
        (("MODEL/sfe", "TEXT", "--boundaries", "greedy", "--samples", 2), "leave out --boundaries greedy"),
        (("MODEL/sfe", "TEXT", "--per-byte", "nowhere/a.parquet"), "there is no folder"),
        (("MODEL/sfe", "TEXT", "--cache", "EMPTY"), "cannot be written to"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_computed(
    folders, tmp_path, capsys, monkeypatch, arguments, message
):
    from tokenizers import Tokenizer, models

    monkeypatch.setattr(scoring, "score_windows", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").touch()
    (tmp_path / "BOS").write_bytes(b"a\xfe")
    (tmp_path / "FAR").write_text("[]\n[]\n[6]\n[]\n")
    Tokenizer(models.WordLevel({"so": 0, "?": 1}, "?")).save("WORDS")
    given = [str(one).replace("MODEL", str(folders)) for one in arguments]
    place = given.index("TEXT") if "TEXT" in given else len(given)
    given[place : place + 1] = ["--dataset", str(folders / "text.jsonl"), "--split", "all"] if "TEXT" in given else []
    try:
        code, out, err = run(capsys, *given)
    except SystemExit as error:  # of a value that is not a choice
        code, (out, err) = error.code, capsys.readouterr()
    assert (code, out) == (2, "")
    assert message in err
