"""Boundaries of any text: as arrays, in terminals, as pages, and by a command."""

import io
import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
from rich.console import Console

import unet
from estimators import WindowedPolicy
from estimators.base import BOS
from experiments.scoring import score as scoring
from experiments.scoring.cache import ScoreCache
from experiments.scoring.models import OpenModel
from experiments.scoring.texts import text_of
from experiments.shade import main
from tests.compositions import SHAPE, registered
from tests.conftest import predict, small_model
from tests.test_decoding import hierarchy
from tests.test_run import usual_promotion as usual_promotion
from unet import Chunker, Distribute, Select
from unet.blocks import transformer
from unet.decoding.score import drawing_keys, keys_of
from unet.hierarchy import Flat
from unet.shading.characters import Character, characters, clusters
from unet.shading.html import fragment, page

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e&\"'"
TEXTS = ("so it goes", "", "né", "a man and then")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(scoring, "BATCH_POSITIONS", 64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    unet.save(registered("sfe"), root / "sfe")
    unet.save(small_model(None), root / "bytes")
    return root


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.split())


def of_two_levels(text="abcdef", depth=(0, 1, 0, 2, 0, 1)):
    size = len(text.encode())
    cost = np.full(size, -math.log(4.0), np.float32)
    return unet.TextBoundaries(
        text.encode(),
        cost,
        np.full_like(cost, np.nan),
        np.linspace(0, 1, size, dtype=np.float32),
        np.array(depth, np.uint8),
        2,
        np.where(np.array(depth)[:, None] > 0, np.float32(0.75), np.float32(np.nan)),
    )


def test_boundaries_are_those_of_score_and_of_the_models_pass():
    model, key = registered("sfe"), jax.random.key(4)
    found = unet.boundaries(model, TEXTS, key=key, batch=3)
    for got, scored, text in zip(found, unet.score(model, TEXTS, key=key, batch=3), TEXTS, strict=True):
        assert got.text == text.encode()
        np.testing.assert_allclose(got.log_prob, scored.logprobs, rtol=1e-6)
        np.testing.assert_array_equal(got.depth, scored.boundary_depth)
        assert b"".join(got.tokens()) == got.text
    (alone,) = unet.boundaries(model, TEXTS[3], key=jax.random.fold_in(key, 3)[None])
    np.testing.assert_allclose(alone.prob, found[3].prob, rtol=1e-5)
    assert ((alone.prob > 0) & (alone.prob < 1)).all()
    assert np.isfinite(alone.early_log_prob).all()
    (greedy,) = unet.boundaries(model, TEXTS[3], key=None)
    np.testing.assert_array_equal(greedy.boundaries, greedy.prob > 0.5)


def test_a_model_without_tokens_has_bits_and_no_boundaries():
    (found,) = unet.boundaries(small_model(None), "abc", key=jax.random.key(0))
    assert found.levels == 0
    assert np.isnan(found.prob).all()
    assert found.tokens() == [b"abc"]
    assert found.bytes_per_token == ()
    assert set(found.columns()) == {"offset", "byte", "log_prob", "early_log_prob"}
    assert 'class="p' not in found._repr_html_()


def test_tokens_of_each_level():
    found = of_two_levels()
    assert found.tokens() == [b"ab", b"cd", b"ef"]
    assert found.tokens(1) == [b"abcd", b"ef"]
    assert found.token().tolist() == [0, 0, 1, 1, 2, 2]
    assert found.token(1).tolist() == [0, 0, 0, 0, 1, 1]
    assert found.bytes_per_token == (2.0, 6.0)
    assert found.bits_per_byte == pytest.approx(2.0)
    assert found.summary() == "6 bytes, 2.000 bits per byte, 2.00 / 6.00 bytes per token"
    assert [one.mark for one in found.characters] == ["", "·", "", "│", "", "·"]


def test_inner_levels_have_probabilities_where_the_level_outside_closed_a_token():
    flat = Flat(transformer(1, SHAPE.dim, 2, 16, window=None, key=jax.random.key(1)))
    chunker = Chunker(Select(), Distribute())
    middle = hierarchy(WindowedPolicy(SHAPE.dim, window=2, target_rate=0.4), chunker, flat, 20)
    outer = hierarchy(WindowedPolicy(SHAPE.dim, window=3, target_rate=0.4), chunker, middle, 30)
    model = eqx.tree_at(lambda m: m.stage, registered("sfe"), outer)
    key = jax.random.key(2)
    (found,) = unet.boundaries(model, TEXTS[3] * 2, key=key, batch=1)
    assert found.levels == 2
    inner, closed = found.prob_of(1), found.closed(0)
    assert 2 < closed.sum() < len(closed)
    np.testing.assert_array_equal(np.isnan(inner), ~closed)
    assert not found.closed(1)[~closed].any()
    # Those of the level itself, of which every token stands where it was closed.
    bytes = jnp.asarray([[BOS, *found.text]])
    first, second = predict(model, bytes, key=drawing_keys(keys_of(key, 1))).levels
    places = np.flatnonzero(np.asarray(first.boundaries.actions[0])) - 1
    of_tokens = np.asarray(second.boundaries.probs[0, : len(places)])
    np.testing.assert_array_equal(places[places >= 0], np.flatnonzero(closed))
    np.testing.assert_allclose(inner[closed], of_tokens[places >= 0], rtol=1e-5)
    assert found.prob_of(0) is found.prob
    assert set(found.columns()) >= {"boundary_prob", "boundary_prob_2", "boundary_2", "token_2"}
    # The other commands read the same.
    opened, text = OpenModel("m", model, None), text_of(found.text, "a text", "a text")
    scores = scoring.score_text(opened, text, scoring.Plan(64, 32, "drawn", 1, 2), ScoreCache(None))
    (same,) = unet.boundaries(model, found.text, key=jax.random.fold_in(jax.random.fold_in(key, 0), 0)[None], batch=1)
    np.testing.assert_allclose(scores.inner_prob[0], same.inner_prob, atol=1e-5)


def test_characters_hold_the_bits_of_all_their_bytes_and_their_token():
    got = of_two_levels("aé€", (1, 0, 0, 0, 0, 2)).characters
    assert [one.text for one in got] == ["a", "é", "€"]
    assert [one.bits for one in got] == pytest.approx([2, 4, 6])
    assert [(one.token, one.token_bytes, one.depth) for one in got] == [(0, 1, 1), (1, 5, 0), (1, 5, 2)]


@pytest.mark.parametrize(
    "signs",
    [
        ["e\u0301", "x"],
        ["👩\u200d👩\u200d👧", "👍🏽"],
        ["🇨🇭", "🇫🇷", "🇩"],
        ["\n", "\u0301"],
        ["क\u093f", "a"],
    ],
)
def test_what_is_drawn_as_one_sign_is_one(signs):
    text = "".join(signs)
    shown = list(clusters(of_two_levels(text, [1] * len(text.encode())).characters))
    assert [one.text for one in shown] == signs
    assert sum(one.bits for one in shown) == pytest.approx(2 * len(text.encode()))


def test_pages_hold_the_text_and_nothing_that_a_browser_would_run_or_fetch():
    content = HOSTILE.encode() + b"\xff"
    depth = np.zeros(len(content), np.uint8)
    shown = characters(np.frombuffer(content, np.uint8), depth / 1.0, depth, depth / 1.0)
    written = page(HOSTILE, fragment([shown], [HOSTILE]))
    for forbidden in ("<script", "\x1b", "\u202e", "http", "src=", "@import", "url("):
        assert forbidden not in written
    assert "&lt;" in written
    assert "\ufffd" in written
    assert 'title="p 0.000, 0.00 bits, token 0 of' in written


def test_terminals_get_colours_and_no_sequence_of_the_text():
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, color_system="truecolor", width=200)
    console.print(of_two_levels("ab\x1bcd\n", (0, 1, 0, 2, 0, 0)))
    written = output.getvalue()
    assert "␛" in written
    assert "\x1b[30;48;2;" in written
    assert "\x1b" + "c" not in written
    assert "│" in written


def test_the_command_shows_several_models_and_writes_every_kind_of_file(folders, capsys, tmp_path):
    files = [tmp_path / name for name in ("a.html", "a.png", "a.parquet", "a.svg")]
    models = [folders / "sfe", folders / "bytes"]
    code, out, err = run(capsys, *models, "--text", "so it goes", "--out", *files)
    assert code == 0, err
    headings = [line for line in out.splitlines() if "bits per byte" in line]
    assert [line.split(":")[0] for line in headings] == [str(one) for one in models]
    assert out.replace("·", "").splitlines()[1::2] == ["so it goes", "so it goes"]
    assert files[0].read_text().count("<pre") == 2
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert files[3].read_text().count('class="note"') == 2
    table = pyarrow.parquet.read_table(files[2]).to_pydict()
    assert bytes(table["byte"]) == b"so it goes" * 2
    assert table["boundary_1"][10:] == [None] * 10
    code, _, err = run(capsys, *models, "--text", "other", "--out", *files)
    assert code == 2
    assert "exists: replace it (--overwrite)" in err


def test_the_command_prints_json_of_the_boundaries_that_the_library_draws(folders, capsys, tmp_path):
    (tmp_path / "text").write_bytes(b"a man \xc3")
    code, out, err = run(
        capsys, folders / "sfe", "--file", tmp_path / "text", "--json", "--boundaries", "greedy", "--context", 64
    )
    assert code == 0, err
    (got,) = json.loads(out)["models"]
    (expected,) = unet.boundaries(registered("sfe"), b"a man \xc3", key=None)
    assert got["bits"] == pytest.approx(expected.bits.tolist(), abs=1e-3)
    assert got["boundary_prob"] == pytest.approx(expected.prob.tolist(), abs=1e-4)
    stops = np.cumsum([len(token) for token in expected.tokens()]).tolist()
    assert got["tokens"] == [[0, *stops[:-1]]]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "name a text: --text 'a text', --text - or --file FILE"),
        (("--text", "a", "--file", "b"), "name a text"),
        (("--text", ""), "--text is empty"),
        (("--file", "nowhere"), "--file nowhere cannot be read: No such file or directory"),
        (
            ("--text", "a", "--out", "a.pdf"),
            "--out a.pdf: the name says what is written, and must end in .html, .svg, .png or",
        ),
        (("--text", "a", "--out", "no/where.html"), "--out no/where.html: there is no folder no"),
        (("--text", "a", "--context", 1), "--context must be a whole number from 2"),
        (("--text", "a", "--step", 4), "names a checkpoint of a run, but"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(folders, capsys, monkeypatch, tmp_path, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, folders / "sfe", *arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert not list(tmp_path.iterdir())


def test_unknown_bits_are_not_shown():
    written = fragment([[Character("a", 0.25, 1)]], ["note"])
    assert "radio" not in written
    assert 'title="p 0.250"' in written
