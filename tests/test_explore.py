"""The server of `experiments.explore`: what it answers, whom it refuses, and what it gives up."""

import base64
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
import xml.etree.ElementTree as ElementTree

import jax
import numpy as np
import pytest

import unet
from experiments.config.presets import PRESETS
from experiments.evaluation.windows import PositionScores, windows_of
from experiments.explore import addresses, listening, main
from experiments.exploring import held, passes
from experiments.exploring.documents import MOST_BODY, MOST_BYTES, answer, json_text, signs
from experiments.exploring.held import HeldModel
from experiments.exploring.passes import Asked, WindowMemory, boundaries_in, prompt_of
from experiments.exploring.worker import Job, Superseded, Worker
from experiments.scoring.cache import ScoreCache
from experiments.scoring.models import OpenModel
from experiments.scoring.score import Plan, score_text
from experiments.scoring.texts import text_of
from tests.compositions import registered
from tests.conftest import needs
from tests.test_shade import HOSTILE, of_two_levels
from tests.test_shade import folders as folders
from unet.shading import svg

needs("explore", "starlette")
needs("explore", "uvicorn")

from starlette.testclient import TestClient  # noqa: E402

from experiments.exploring.app import make_app  # noqa: E402
from experiments.exploring.guard import HEADERS, LOCAL, is_local  # noqa: E402

CONTEXT = 64
ODD = "é👩\u200d👧 שלום e\u0301 <b>\x1b".encode() + b"\xe2\x82"


@pytest.fixture(scope="module")
def client(folders):
    models = [HeldModel(str(folders / name)) for name in ("sfe", "bytes")]
    with TestClient(make_app(models, CONTEXT, LOCAL, None), base_url="http://127.0.0.1:8765") as client:
        yield client


def request(text=b"so it goes", models=(0, 1), **values):
    asked = {"client": "a", "text": base64.b64encode(text).decode(), "boundaries": "greedy", "seed": 0}
    return asked | {"models": [{"model": one} for one in models]} | values


def messages(client, what, **values):
    response = client.post(f"/api/{what}", json=request(**values))
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


def final(found, model=0):
    return next(
        one for one in found if one["model"] == model and one["state"] not in ("compiling", "working", "prompt")
    )


def one_text(text, key):
    """What the library makes of a text. Its program is that of other tests."""
    (found,) = unet.boundaries(registered("sfe"), text, key=key[None])
    return found


def test_the_page_knows_its_models(client):
    found = client.get("/api/models").json()
    assert [one["levels"] for one in found["models"]] == [1, 0]
    assert [one["steps"] for one in found["models"]] == [[], []]
    assert found["context"] == CONTEXT
    for name in ("", "explore.js", "panel.js", "shades.css", "explore.css"):
        response = client.get(f"/{name}")
        assert response.status_code == 200
        assert {name: response.headers[name] for name in HEADERS} == HEADERS


def test_every_model_answers_with_the_boundaries_of_the_library(client):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 0), 0)
    found = messages(client, "boundaries", boundaries="drawn", seed=3)
    expected = one_text("so it goes", key)
    got = final(found)
    assert got["state"] == "done"
    assert got["signs"]["text"] == list("so it goes")
    np.testing.assert_allclose(got["signs"]["p"], expected.prob, atol=1e-4)
    np.testing.assert_allclose(got["signs"]["bits"], expected.bits, atol=1e-3)
    assert got["ends"] == [(np.flatnonzero(expected.boundaries) + 1).tolist()]
    assert got["bpb"] == pytest.approx(expected.bits_per_byte, abs=1e-3)
    assert sum(got["token_bits"][0]) == pytest.approx(expected.bits.sum(), abs=0.1)
    without = final(found, 1)
    assert (without["levels"], without["ends"], without["signs"]["p"]) == (0, [], [None] * 10)
    # The program is there now, and the answer too.
    assert [one["state"] for one in messages(client, "boundaries", boundaries="drawn", seed=3)] == ["done", "done"]


def test_a_text_longer_than_a_window_is_read_as_by_the_other_commands():
    opened, content = OpenModel("m", registered("sfe"), None), b"so it goes, and a man " * 4
    told: list[int] = []
    found = boundaries_in(opened, Asked(content, "drawn", 5), 32, memory := WindowMemory(), told.append)
    text = text_of(content, "a text", "a text")
    scores = score_text(opened, text, Plan(32, 16, "drawn", 1, 5), ScoreCache(None))
    np.testing.assert_allclose(found.log_prob, scores.log_prob[0], rtol=1e-5)
    np.testing.assert_array_equal(found.depth, scores.depth[0])
    assert sum(told) == len(content) + 1
    # Where something is added, only the windows that read it are computed.
    told.clear()
    longer = boundaries_in(opened, Asked(content + b"!", "drawn", 5), 32, memory, told.append)
    assert 0 < sum(told) <= 32
    np.testing.assert_array_equal(longer.log_prob[:-1], found.log_prob)
    alone = boundaries_in(opened, Asked(content + b"!", "drawn", 5), 32, WindowMemory())
    np.testing.assert_allclose(longer.log_prob, alone.log_prob, rtol=1e-5)
    np.testing.assert_array_equal(longer.depth, alone.depth)
    other = boundaries_in(opened, Asked(content + b"!", "drawn", 6), 32, memory)
    assert (other.depth != longer.depth).any()


def test_texts_of_any_kind_are_answered_sign_by_sign(client):
    got = final(messages(client, "boundaries", text=ODD, models=(0,)))
    assert "".join(got["signs"]["text"]) == ODD[:-2].decode().replace("\x1b", "␛") + "��"
    assert sum(got["signs"]["size"]) == len(ODD) == got["bytes"]
    assert "👩\u200d👧" in got["signs"]["text"]
    assert "e\u0301" in got["signs"]["text"]
    empty = final(messages(client, "boundaries", text=b"", models=(0,)))
    assert (empty["bytes"], empty["bpb"], empty["ends"], empty["signs"]["text"]) == (0, None, [[]], [])
    wrong = final(messages(client, "boundaries", text=b"a\xff", models=(0,)))
    assert "the text holds the byte 255 at offset 1" in wrong["error"]


def test_what_windows_say_is_kept_up_to_a_size(monkeypatch):
    """Windows of four positions, of which sixteen are computed at once: what is left of them holds nothing of the others."""
    memory, windows = WindowMemory(), list(windows_of(0, 34, 4, 2))

    def compute(some):
        size = sum(one.stop - one.counted for one in some)
        zeros, truth = np.zeros(size, np.float32), np.zeros(size, bool)
        inner = np.zeros((size, 0), np.float32)
        return PositionScores(zeros, zeros, zeros, truth.astype(np.uint8), truth, truth, inner)

    found = memory.scores(0, Asked(b"a" * 34, "drawn", 1), windows, compute)
    assert len(found.prob) == 35
    whole = memory.bytes
    monkeypatch.setattr(passes, "KEPT_BYTES", whole // 2)
    memory.scores(0, Asked(b"b" * 34, "drawn", 1), windows, compute)
    kept = list(memory._kept.items())
    assert whole // 4 < memory.bytes <= whole // 2
    arrays = [of for _, scores in kept for of in vars(scores).values()]
    assert sum(of.nbytes for of in arrays) + sum(len(key.text) for key, _ in kept) == memory.bytes
    assert all(of.base is None for of in arrays)


def test_an_answer_is_given_up_between_its_signs():
    found, asked = of_two_levels("a" * 10_000, [0] * 10_000), []

    def check():
        asked.append(None)
        if len(asked) == 3:
            raise Superseded

    with pytest.raises(Superseded):
        answer(found, check)
    whole = {"a": [*range(5000)], "b": [[0.5] * 5000, []], "c": [], "é": "é", "d": None, "e": [{"f": [1]}]}
    assert json.loads(json_text(whole)) == whole
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text({"a": [math.nan]})


def test_a_checkpoint_to_begin_with_does_not_hide_the_newest_model(tmp_path, monkeypatch):
    steps, model = [3, 5], registered("sfe")

    def opened(where, step=None, plugins=()):
        return OpenModel(where, model, PRESETS["tiny"], step)

    class Read:
        open = staticmethod(lambda step: opened("", step))

    monkeypatch.setattr(held, "open_model", opened)
    monkeypatch.setattr(held, "stored_steps", lambda folder: steps)
    monkeypatch.setattr(held, "Checkpoints", lambda where, plugins: Read())
    one = HeldModel(str(tmp_path), 3)
    assert (one.first.step, one.at(3).step, one.at(None).step) == (3, 3, 5)
    steps.append(7)
    assert not one.is_open(None)
    assert one.at(None).step == 7
    (tmp_path / "model.safetensors").touch()
    assert one.finished
    assert one.at(None).step is None
    # What is said of it holds on to no model.
    assert not [leaf for leaf in jax.tree.leaves(vars(one.first)) if isinstance(leaf, jax.Array)]


def test_levels_have_their_own_tokens():
    got = answer(of_two_levels())
    assert got["ends"] == [[2, 4, 6], [4]]
    assert got["bytes_per_token"] == [2.0, 6.0]
    assert got["token_bits"] == [[4.0, 4.0, 4.0], [8.0, 4.0]]
    assert got["inner_p"] == [[None, 0.75, None, 0.75, None, 0.75]]
    columns = signs(b"a\nb", of_two_levels("a\nb", (0, 1, 0)).characters)
    assert columns["text"] == ["a", "⏎\n", "b"]
    assert columns["depth"] == [0, 1, 0]


def test_a_text_goes_on_as_generation_has_it(client):
    settings = {"temperature": 0.7, "max_bytes": 20}
    found = messages(client, "continue", models=(0,), boundaries="drawn", seed=4, **settings)
    key = jax.random.fold_in(jax.random.key(4), 0)
    generated = unet.generate(registered("sfe"), "so it goes", max_bytes=20, key=key, sampling=unet.Sampling(0.7))
    (expected,) = generated.texts
    columns: dict[str, list] = {"text": [], "depth": []}
    updates = [one for one in found if "signs" in one]
    for one in updates:
        for name, values in columns.items():
            values[one["known"] :] = one["signs"][name]
    assert base64.b64decode(updates[-1]["text"]) == expected.piece.bytes
    assert columns == {name: signs(expected.piece.bytes, _characters(expected.piece))[name] for name in columns}
    assert updates[-1]["finish"] == expected.piece.finish
    assert len(updates) > 1
    assert "temperature must be" in final(messages(client, "continue", models=(0,), temperature=-1))["error"]


def _characters(piece):
    from unet.shading.characters import characters

    values = np.frombuffer(piece.bytes, np.uint8)
    return characters(values, np.full(len(values), np.nan), piece.boundary_depth, np.zeros(len(values)))


def test_a_continuation_reads_the_end_of_a_long_text_from_a_character_on():
    text = "é".encode() * 3000
    assert prompt_of(b"a" + text) == text[-4096:]
    assert prompt_of(text + b"a") == (text + b"a")[-4095:]
    assert prompt_of(b"short") == b"short"
    # What is no character is cut as it is.
    assert prompt_of(b"\x80" * 5000) == b"\x80" * 4093
    assert prompt_of(b"a" * 1000 + b"\x80" * 4096) == b"\x80" * 4093


@pytest.mark.parametrize("form", ["html", "svg"])
def test_what_is_saved_needs_nothing_and_runs_nothing(client, form):
    response = client.post("/api/export", json=request(HOSTILE.encode() + b"\xe2", format=form, shading="bits"))
    assert response.status_code == 200, response.text
    written = response.text
    for forbidden in ("<script", "\x1b", "\u202e", "http:" if form == "html" else "href", "src=", "@import", "url("):
        assert forbidden not in written
    assert "bits per byte" in written
    assert "prefers-color-scheme: dark" in written
    if form == "svg":
        root = ElementTree.fromstring(written)
        drawn = [str(one.text) for one in root.iter("{http://www.w3.org/2000/svg}text") if one.get("class") is None]
        assert "".join(drawn).startswith("<script>alert(1)</script>␛[31m")
        assert ".c20{fill" in written
        assert ".p20{fill" not in written
    assert client.post("/api/export", json=request(format="pdf")).json() == {"error": "format must be html or svg"}


def test_pictures_place_wide_signs_and_lines_from_right_to_left(monkeypatch):
    found = of_two_levels("漢a\nשל", [0] * 9)
    root = ElementTree.fromstring(svg.picture([found.characters], ["note"]))
    boxes = [
        (float(one.get("x", 0)), float(one.get("width", 0)))
        for one in root.iter("{http://www.w3.org/2000/svg}rect")
        if "sign" in one.get("class", "")
    ]
    first, second, _, right, left = boxes
    assert first[1] == 2 * second[1]
    assert second[0] == first[0] + first[1]
    assert right[0] > left[0] > second[0]
    # No picture has what XML forbids.
    odd = "".join(map(chr, (*range(32), 0x7F, 0xFFFD, 0xFFFE, 0xFFFF, 0x1FFFE)))
    ElementTree.fromstring(svg.picture([of_two_levels(odd, [0] * len(odd.encode())).characters], [odd]))
    monkeypatch.setattr(svg, "MOST_SIGNS", 5)
    assert "the first 5 of 6 characters" in svg.picture([of_two_levels().characters], ["note"])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"text": "?"}, "text must be bytes in base64"),
        ({"text": 4}, "text must be bytes in base64"),
        ({"boundaries": "none"}, "boundaries must be drawn or greedy"),
        ({"seed": -1}, "seed must be"),
        ({"seed": True}, "seed must be"),
        ({"client": ""}, "client must be a short string"),
        ({"models": []}, "models must be a list of 1 to 2 models"),
        ({"models": [{"model": 2}]}, "there is no model 2"),
        ({"models": [{"model": 0}, {"model": 0}]}, "each model is asked once"),
        ({"models": [{"model": 0, "step": "x"}]}, "step must be a whole number"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused(client, values, sentence):
    response = client.post("/api/boundaries", json=request() | values)
    assert response.status_code == 400
    assert sentence in response.json()["error"]


def test_what_is_no_request_is_refused(client):
    as_json = {"content-type": "application/json"}
    for content in (b"", b"{", b"[]", b"[" * 100_000, b"\xff"):
        assert client.post("/api/boundaries", content=content, headers=as_json).status_code == 400
    huge = client.post("/api/boundaries", content=b" " * (MOST_BODY + 1), headers=as_json)
    assert huge.status_code == 413
    assert "this page takes up to 1,000,000 bytes" in huge.json()["error"]
    long = client.post("/api/boundaries", json=request(b"a" * (MOST_BYTES + 1)))
    assert "the text has 1,000,001 bytes" in long.json()["error"]
    unknown = client.post("/api/boundaries", json=request() | {"models": [{"model": 0, "step": 7}]})
    assert "holds no checkpoint of step 7" in unknown.text


@pytest.mark.parametrize(
    ("headers", "refused"),
    [
        ({"host": "localhost:9000"}, False),
        ({"host": "[::1]:8765"}, False),
        ({"host": "evil.example"}, True),
        ({"host": "127.0.0.1.evil.example"}, True),
        ({"host": "[::1"}, True),
        ({"host": ""}, True),
        ({"origin": "http://127.0.0.1:8765"}, False),
        ({"origin": "http://evil.example"}, True),
        ({"origin": "null"}, True),
        ({"origin": "http://[::1"}, True),
        ({"content-type": "text/plain"}, True),
    ],
)
def test_foreign_pages_are_refused(client, headers, refused):
    sent = {"content-type": "application/json"} | headers
    response = client.post("/api/boundaries", content=json.dumps(request(b"", models=(0,))), headers=sent)
    assert (response.status_code == 403) == refused, response.text
    assert response.headers["content-security-policy"] == HEADERS["Content-Security-Policy"]


def test_beyond_this_machine_the_address_needs_its_token():
    client = TestClient(make_app([], CONTEXT, None, "secret"), base_url="http://anything")
    for path in ("/", "/api/models", "/secre", "/secrets/", "/wrong/api/models", "/explore.js", "/é"):
        assert client.get(path).status_code == 403, path
    assert client.get("/secret/api/models").json()["models"] == []
    redirected = client.get("/secret", follow_redirects=False)
    assert (redirected.status_code, redirected.headers["location"]) == (307, "/secret/")
    assert "Where tokens end" in client.get("/secret/").text
    assert [is_local(one) for one in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::", "example.org")] == [
        *(True, True, True),
        *(False, False, False),
    ]


@pytest.mark.parametrize(
    ("host", "address", "elsewhere"),
    [
        ("127.0.0.1", "http://127.0.0.1:{port}/", None),
        ("localhost", "http://localhost:{port}/", None),
        ("0.0.0.0", "http://127.0.0.1:{port}/", "http://{name}:{port}/"),
        ("::", "http://[::1]:{port}/", "http://{name}:{port}/"),
    ],
)
def test_the_address_can_be_opened(host, address, elsewhere):
    if ":" in host and not socket.has_ipv6:
        pytest.skip("no IPv6")
    with listening(host, 0) as place:
        names = {"port": place.getsockname()[1], "name": socket.gethostname()}
        wanted = address.format(**names), elsewhere and elsewhere.format(**names)
        assert addresses(host, place, None) == wanted
        assert addresses(host, place, "secret")[0] == f"{wanted[0]}secret/"


def test_the_command_ends_while_something_compiles(folders, tmp_path):
    """As by Ctrl-C, without a crash and without waiting for what cannot be interrupted."""
    command = [sys.executable, "-m", "experiments.explore", str(folders / "sfe"), "--port", "0"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **streams) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        # A length of which there is no program yet.
        body = json.dumps(request(b"a" * 5000, models=(0,))).encode()
        asked = urllib.request.Request(f"{address}api/boundaries", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked) as answered:
            assert json.loads(answered.readline())["state"] == "compiling"
            process.send_signal(signal.SIGINT)
            _, written = process.communicate(timeout=60)
    assert process.returncode == 130, written
    assert written.rstrip().endswith("stopped")


def test_a_newer_question_of_the_same_page_ends_the_older_one_and_no_other():
    worker, sent, running, done = Worker("test"), [], threading.Event(), threading.Event()

    def job(owner, name, work=lambda job: None):
        def send(message):
            sent.append((name, message and message["state"]))
            if message is None and name == "newer":
                done.set()

        return Job(owner, work, send)

    def work(job):
        running.set()
        # As in a pass that takes a while: it looks now and then.
        assert job.cancelled.wait(30)
        job.check()

    def fails(job):
        raise ValueError("a sentence")

    worker.submit(job(("a", "boundaries"), "older", work))
    assert running.wait(30)
    waiting = job(("a", "boundaries"), "waiting")
    worker.submit(waiting)
    worker.submit(job(("b", "boundaries"), "other", fails))
    worker.submit(job(("a", "boundaries"), "newer", lambda job: job.send({"state": "done"})))
    assert waiting.cancelled.is_set()
    assert done.wait(30)
    worker.stop()
    worker.join(30.0)
    assert [one for one in sent if one[1]] == [
        ("older", "superseded"),
        ("waiting", "superseded"),
        ("other", "error"),
        ("newer", "done"),
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "name at least one model"),
        (("nowhere",), "nowhere"),
        (
            ("{folders}/bytes",),
            "has no level of tokens and so no boundaries: name a model that has, beside it or instead",
        ),
        (("{folders}/sfe", "{folders}/sfe"), "each model is named once"),
        (("{folders}/sfe", "--port", 70000), "--port must be a whole number from 0 to 65535; got 70000"),
        (("{folders}/sfe", "--port", "{taken}"), "is taken: name another, or 0 for any that is free"),
        (("{folders}/sfe", "--host", "no such host"), "--host no such host is no address of this machine"),
        (("{folders}/sfe", "--step", 4), "--step 4 names a checkpoint of a run, but"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(folders, capsys, arguments, sentence):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = [str(one).format(folders=folders, taken=taken.getsockname()[1]) for one in arguments]
        port = [] if "--port" in given else ["--port", "0"]
        code = main(given + port)
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert sentence in " ".join(captured.err.split())


def test_without_its_packages_the_command_says_what_to_install(folders, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main([str(folders / "sfe")]) == 2
    assert "this needs the package uvicorn: pip install 'caesura-lm[explore]'" in " ".join(
        capsys.readouterr().err.split()
    )
