"""The command that writes with a trained model."""

import base64
import io
import json
import sys

import equinox as eqx
import jax
import numpy as np
import pytest

import unet
from experiments import export, words
from experiments.config.errors import ConfigError
from experiments.generate import main
from experiments.reporting.texts import MARKS, shown
from experiments.training.initial import initial_weights
from tests.compositions import registered
from tests.test_run import usual_promotion as usual_promotion
from unet.decoding.generate import Generation, Piece
from unet.decoding.utf8 import character_spans


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    unet.save(registered("sfe"), folder)
    return folder


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.split())


def test_json_is_one_document_with_everything_in_it(folder, capsys):
    code, out, err = run(
        capsys, folder, "--prompt", "a man", "--num", 2, "--max-bytes", 12, "--json", "--seed", 5, "--top-p", 0.9
    )
    assert code == 0
    found = json.loads(out)
    expected = unet.generate(
        registered("sfe"),
        ["a man"] * 2,
        max_bytes=12,
        key=jax.random.key(5),
        sampling=unet.Sampling(top_p=0.9),
    )
    for text, other in zip(found["texts"], expected.texts, strict=True):
        assert base64.b64decode(text["base64"]) == other.piece.bytes
        assert text["text"] == other.text
        assert text["finish"] == "length"
        assert text["log_prob"] == pytest.approx(float(other.piece.logprobs.sum()), abs=1e-3)
        assert sum(text["logprobs"]) == pytest.approx(text["log_prob"], abs=1e-3)
        assert text["boundaries"] == np.flatnonzero(other.piece.boundaries).tolist()
    assert found["throughput"]["steps"] == 12
    assert found["throughput"]["bytes_per_second"] is None
    assert found["settings"]["seed"] == 5
    assert "24 bytes at" in err


def test_marks_stand_where_tokens_close(folder, capsys):
    _, plain, _ = run(capsys, folder, "--prompt", "a man", "--max-bytes", 9, "--utf8")
    _, marked, _ = run(capsys, folder, "--prompt", "a man", "--max-bytes", 9, "--utf8", "--show-boundaries")
    assert plain.startswith("a man")
    assert MARKS[0] in marked
    assert marked.replace(MARKS[0], "") == plain


def test_a_stream_is_the_same_text(folder, capsys):
    asked = (folder, "--prompt", "a man", "--max-bytes", 40, "--utf8", "--temperature", 2)
    _, whole, _ = run(capsys, *asked)
    _, streamed, _ = run(capsys, *asked, "--stream")
    assert streamed == whole
    _, several, _ = run(capsys, *asked, "--stream", "--num", 2)
    assert whole.splitlines()[0] in several


def test_a_prompt_comes_from_standard_input(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("né\n".encode())))
    code, out, _ = run(capsys, folder, "--prompt", "-", "--max-bytes", 3, "--utf8")
    assert code == 0
    assert out.startswith("né\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-bytes", 0), "--max-bytes must be a whole number from 1 to"),
        (("--num", 0), "--num must be a whole number from 1 to"),
        (("--json", "--stream"), "leave out --stream"),
        (("--top-k", 0), "--top-k must be a whole number from 1 to 1048576; got 0"),
        (("--stop", ""), "stop string"),
        # How an argument that is no UTF-8 comes to a program.
        (("--prompt", "a\udcfe"), "holds the byte 254"),
    ],
)
def test_a_users_error_is_one_sentence(folder, capsys, arguments, message):
    code, out, err = run(capsys, folder, *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_missing_or_damaged_run_is_named(folder, tmp_path, capsys):
    code, _, err = run(capsys, tmp_path)
    assert code == 2
    assert f"{tmp_path} holds neither a run nor the weights of a model" in err
    content = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    code, _, err = run(capsys, tmp_path)
    assert code == 2
    assert "is damaged" in err


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_model_whose_weights_are_not_numbers_is_refused_by_every_command(tmp_path, capsys, monkeypatch, value):
    broken = eqx.tree_at(
        lambda model: model.embedding, registered("sfe"), replace_fn=lambda leaf: leaf.at[3, 2].set(value)
    )
    unet.save(broken, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    folder = str(tmp_path / "run")
    for command, arguments in (
        (main, ["run", "--json"]),
        (export.main, ["run", "--to", "there"]),
        (words.main, ["run", "--segmenter", "whitespace"]),
    ):
        assert command(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "run holds weights that are not numbers, in 1 of" in captured.err
        assert ".embedding" in captured.err
    with pytest.raises(ConfigError, match="weights that are not numbers"):
        initial_weights(folder, registered("sfe"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_closed_standard_input_is_named(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert run(capsys, folder, "--prompt", "-")[::2] == (2, "error: --prompt - reads standard input, which is closed")


def piece_of(content, finish, closed=()):
    levels = np.zeros(len(content), int)
    for place in closed:
        levels[place] += 1
    return Generation(b"", np.zeros(0, int), Piece(content, np.zeros(len(content)), levels, finish))


def test_only_whole_characters_are_shown_until_the_end():
    content = "né".encode()[:2]
    assert shown(piece_of(content, None), marks=False).plain == "n"
    assert shown(piece_of(content, "length"), marks=False).plain == "n\N{REPLACEMENT CHARACTER}"
    # A token that closes inside a character is marked behind it.
    assert shown(piece_of("né!".encode(), "length", closed=(1,)), marks=True).plain == f"né{MARKS[0]}!"
    # And with another mark where levels inside close one too.
    assert shown(piece_of(b"abcd", "length", closed=(0, 1, 1, 2, 2, 2, 2)), marks=True).plain == "a·b│c┃d"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("aé€😀".encode(), ["a", "é", "€", "😀"]),
        (b"\xff\xc3(\xe2\x82", ["\ufffd", "\ufffd", "(", "\ufffd", "\ufffd"]),
        (b"\xed\xa0\x80", ["\ufffd"] * 3),
    ],
)
def test_characters_are_those_of_utf8(content, parts):
    found = [content[first:last].decode("utf-8", errors="replace") for first, last in character_spans(content)]
    assert found == parts
