"""What commands print and how they end: no control characters, no tracebacks, one exit code for each kind of end."""

import errno
import io
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.errors import JaxRuntimeError

from data import DataError, WorkerError
from experiments import bench, compare, export, lab, launch, runs, words
from experiments import generate as generate_module
from experiments import run as run_module
from experiments.command import exit_code, sentence_of
from experiments.config.arguments import parsed
from experiments.config.errors import ConfigError, RunError
from experiments.reporting.display import Display
from experiments.reporting.report import html_page
from experiments.reporting.texts import MARKS, PlainTexts, ShownTexts, content_of, standard_output
from experiments.terminal import Lenient, OutputClosed, escaped, message, write_output
from unet.decoding.generate import Generation, Piece, TextStream
from unet.files.saving import LoadError
from unet.shading.characters import Character, visible

HOSTILE = "a\x1b[2J\x07\x9b31m\r\x7f\u202eb\u2028\x00"
"""Clears a screen, rings, colours, goes to the start of the line, turns the direction, and breaks the line."""


def acted_on(text, allowed="\n"):
    """The characters of a text that a terminal would act on."""
    return [one for one in text if not one.isprintable() and one not in allowed]


def test_control_characters_are_made_visible():
    assert visible(HOSTILE) == "a␛[2J␇\ufffd31m␍␡\ufffdb\ufffd␀"
    assert visible("Tab\tund Zeile\nwie sie sind: é中😀") == "Tab\tund Zeile\nwie sie sind: é中😀"
    assert escaped(HOSTILE) == "a\\x1b[2J\\x07\\x9b31m\\r\\x7f\\u202eb\\u2028\\x00"
    # How Python has a file name that is no UTF-8, and half of a surrogate pair.
    assert escaped("caf\udce9.txt \ud83d") == "caf\\xe9.txt \\ud83d"


def test_messages_are_one_bounded_line():
    assert message("two\n  lines\tand\x1b") == "two lines and\\x1b"
    for text in ("x" * 10**7, "\x00" * 10**6, "y" * 601):
        line = message(f"start {text} what to do")
        assert len(line) <= 600
        assert line.startswith("start")
        assert line.endswith("what to do")
    assert message("z" * 600) == "z" * 600


def test_a_display_shows_nothing_that_a_terminal_acts_on(capsys):
    display = Display()
    display.note(f"files in runs/:smile:/{HOSTILE}\nand a table")
    display.error(f"{HOSTILE}\n\n{'x' * 10_000}")
    display.sample([[Character(one, 0.5, 0) for one in f"{HOSTILE}\n"]])
    said = capsys.readouterr().err
    assert acted_on(said) == []
    assert "runs/:smile:/a\\x1b[2J" in said
    assert "and a table\n" in said
    assert [len(line) <= 600 for line in said.splitlines()] == [True] * len(said.splitlines())


class Failing(io.StringIO):
    """A stream that fails."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize(
    "error", [BrokenPipeError(), OSError(errno.EIO, "gone"), ValueError("I/O operation on closed file")]
)
def test_work_goes_on_where_its_messages_are_not_read(error, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Failing(error))
    display = Display()
    display.note("one")
    display.note("two")
    monkeypatch.setattr(sys, "stderr", None)
    Display().note("three")


def test_messages_have_replacements_in_other_encodings():
    for encoding, expected in (("ascii", b"5 +- 1 ... \\u4e2d \\xe9"), ("latin-1", b"5 \xb1 1 ... \\u4e2d \xe9")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
        lenient = Lenient(stream)
        lenient.write("5 ± 1 … 中 é")
        lenient.flush()
        assert stream.buffer.getvalue() == expected


def test_output_has_replacements_in_other_encodings(monkeypatch):
    for encoding, expected in (("ascii", b"5 ? ?"), ("latin-1", b"5 ? \xe9")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
        launch.replace_unknown(stream)
        monkeypatch.setattr(sys, "stdout", stream)
        write_output("5 – é")
        assert stream.buffer.getvalue() == expected


def piece_of(content, *, closed=(), prompt=b"", ended=True):
    depth = np.zeros(len(content), int)
    for place in closed:
        depth[place] += 1
    return Generation(
        prompt, np.zeros(len(prompt), int), Piece(content, np.zeros(len(content)), depth, "length" if ended else None)
    )


BYTES = b"if x:\n\tpass\r\n\x1b[31m\xff\xc3\xa9\x00"


def test_a_pipe_gets_the_bytes_as_they_are(capfdbinary):
    output = standard_output(marks=False)
    assert isinstance(output, PlainTexts)
    output.write([piece_of(BYTES, prompt=b"\t\r\xe9")])
    assert capfdbinary.readouterr().out == b"\t\r\xe9" + BYTES + b"\n"
    output.write([piece_of(b"one"), piece_of(b"two")])
    first, text, second, other, _ = capfdbinary.readouterr().out.decode().split("\n")
    assert (text, other) == ("one", "two")
    assert (first.strip("─"), second.strip("─")) == (" 1 ", " 2 ")
    assert content_of(piece_of("né!".encode(), closed=(1,)), marks=True).decode() == f"né{MARKS[0]}!"


def test_a_growing_text_is_the_same_bytes(capfdbinary):
    output = PlainTexts(marks=True)
    with output.growing(1):
        for end in range(1, len(BYTES)):
            output.grow([piece_of(BYTES[:end], closed=(0,), ended=False)])
        output.grow([piece_of(BYTES, closed=(0,))])
    assert capfdbinary.readouterr().out == b"i" + MARKS[0].encode() + BYTES[1:] + b"\n"
    output = PlainTexts(marks=False)
    with output.growing(2):
        output.grow([piece_of(b"o", ended=False), piece_of(b"two")])
        output.grow([piece_of(b"one"), piece_of(b"two")])
    assert capfdbinary.readouterr().out.decode().count("one\n") == 1


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize("growing", [False, True])
def test_a_terminal_gets_nothing_of_the_texts_that_it_acts_on(growing, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    output = standard_output(marks=False)
    assert isinstance(output, ShownTexts)
    text = piece_of(HOSTILE.encode() + b"\x1b]0;title\x07\xff")
    with output.growing(1):
        output.grow([text]) if growing else output.write([text])
    shown = terminal.getvalue()
    assert acted_on(shown) == []
    assert shown.startswith("a␛[2J␇\ufffd31m␍␡\ufffdb\ufffd␀␛]0;title␇\ufffd")


ENDS = [
    (ConfigError("no such setting"), 2, "error: no such setting"),
    (WorkerError("a process was ended"), 1, "error: a process was ended"),
    (DataError(f"{HOSTILE} is\nno file"), 2, "error: a\\x1b[2J"),
    (LoadError("x" * 10_000), 2, "error: xxx"),
    (RunError("the disk is full"), 1, "error: the disk is full"),
    (
        OSError(errno.ENOSPC, "No space left on device", "runs/x"),
        1,
        "error: runs/x: No space left on device; make room",
    ),
    (
        PermissionError(errno.EACCES, "Permission denied", b"caf\xe9"),
        1,
        "error: caf\\xe9: Permission denied; check its perm",
    ),
    (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/x"),
        1,
        "error: /proc/x: No such file or directory",
    ),
    (ConnectionResetError("peer"), 1, "error: peer"),
    # Not of standard output, but of a process or a connection: not a reader that has had enough.
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "error: Broken pipe"),
    (MemoryError(), 1, "error: there is not enough memory"),
    (
        JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
        1,
        "error: there is not enough memory",
    ),
    (KeyboardInterrupt(), 130, "stopped"),
    (OutputClosed(), 141, ""),
]


@pytest.mark.parametrize(
    ("error", "code", "said"), ENDS, ids=[f"{type(error).__name__}-{code}" for error, code, _ in ENDS]
)
def test_every_end_has_its_exit_code_and_message(error, code, said, capsys):
    def command():
        raise error

    assert exit_code(Display(), command) == code
    text = capsys.readouterr().err
    assert text.startswith(said)
    assert len(text) <= 601
    assert text.count("\n") == bool(said)
    assert acted_on(text) == []


def test_a_fault_of_the_library_keeps_its_traceback():
    for error in (TypeError("x"), JaxRuntimeError("INTERNAL: x")):

        def command(error=error):
            raise error

        with pytest.raises(type(error)):
            exit_code(Display(), command)


def test_another_interrupt_meanwhile_changes_nothing(monkeypatch):
    monkeypatch.setattr(Display, "note", lambda self, text: os.kill(os.getpid(), signal.SIGINT))

    def command():
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    assert exit_code(Display(), command) == 130
    assert signal.getsignal(signal.SIGINT) is before


COMMANDS = {
    run_module: ("run", ()),
    compare: ("compare", ("--estimators", "uniform")),
    export: ("export", ("runs/x", "--to", "there")),
    generate_module: ("generate", ("runs/x",)),
    words: ("analyse_runs", ("runs/x",)),
    runs: ("list_runs", ("runs/x",)),
    lab: ("run", ("--out", "there")),
    bench: ("bench", ("ops",)),
}


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_all_commands_end_alike(module, monkeypatch, tmp_path, capsys):
    name, arguments = COMMANDS[module]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "settle_cpu_devices", lambda count, named: None)
    for error, code in (
        (KeyboardInterrupt(), 130),
        (OutputClosed(), 141),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (ConfigError("x"), 2),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(module, name, fail)
        assert module.main(arguments) == code
        assert capsys.readouterr().err.count("\n") == (code != 141)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def closed_pipe():
    """A pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    stream = open(writing, "w", encoding="utf-8")  # noqa: SIM115
    yield stream
    launch.drop_unwritten(stream)
    stream.close()


def test_a_reader_that_has_had_enough_ends_a_command_in_silence(closed_pipe, monkeypatch, capsys):
    """Texts as they are written, whatever else is printed when that is flushed, and help."""
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    for write in (lambda: write_output("x" * 10**6), lambda: write_output(b"x"), lambda: print("x")):
        assert exit_code(Display(), write) == 141
    for module, (_, arguments) in COMMANDS.items():
        assert module.main([*arguments, "--help"]) == 141
    monkeypatch.setattr(sys, "stdout", None)
    assert lab.main(["--help"]) == 141
    assert exit_code(Display(), lambda: write_output("x")) == 141
    assert exit_code(Display(), lambda: None) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk to write to")
def test_a_full_disk_behind_standard_output_is_named(monkeypatch, capsys):
    with Path("/dev/full").open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert exit_code(Display(), lambda: write_output("x")) == 1
        launch.drop_unwritten(stream)
    assert capsys.readouterr().err.startswith("error: standard output: No space left on device; make room")


def test_an_error_of_the_system_may_have_no_text():
    assert sentence_of(OSError()) == "OSError"
    assert sentence_of(OSError("lost")) == "lost"


def test_the_home_folder_stands_for_a_tilde_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ("--out", "--init", "--data.cache", "--entropy.model")
    config = run_module.parse(["--estimator", "entropy", *(word for flag in flags for word in (flag, f"~/{flag[2:]}"))])
    assert (config.out, config.data.cache, config.init) == (
        tmp_path / "out",
        tmp_path / "data.cache",
        str(tmp_path / "init"),
    )
    assert config.settings["entropy"]["model"] == str(tmp_path / "entropy.model")
    common = compare.parse_compare(["--estimators", "uniform", "--out=~/a", "--tables", "~/b", "~/c"])
    assert (common.out, common.tables) == (tmp_path / "a", (tmp_path / "b", tmp_path / "c"))
    analysed = parsed(words.WordsConfig, "words", ["~/a", "~/b", "--out", "~/c"])
    assert (analysed.runs, analysed.out) == ((tmp_path / "a", tmp_path / "b"), tmp_path / "c")
    assert parsed(lab.LabConfig, "lab", ["--out", "~/a"]).out == tmp_path / "a"
    assert bench.parse(["ops", "--json", "~/a"]).json == tmp_path / "a"
    # Not in the middle, and not of what is no path.
    assert run_module.parse(["--out", "a~/b", "--dataset", "~/text"]).out == Path("a~/b")


def test_models_are_looked_for_in_the_home_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for main, arguments in (
        (generate_module.main, ["~/run"]),
        (export.main, ["~/run", "--to", "~/there"]),
        (run_module.main, ["--resume", "--out=~/run"]),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err.replace("\n", " ")
        assert f"{tmp_path / 'run'} holds no" in said or f"there is no file or folder {tmp_path / 'run'}" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--out", "--init", "--data.cache"])
def test_an_unknown_user_is_named(flag, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_module.main([f"{flag}=~nobodyhere/x"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ~nobodyhere/x: there is no home folder of ~nobodyhere")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argument", [f"--{HOSTILE}", "--" + "x" * 20_000, "--batch=caf\udce9"])
def test_usage_errors_are_plain_and_bounded(argument, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(lab.LabConfig, "lab", ["--out", "x", argument])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert acted_on(said) == []
    assert 0 < len(said) < 4000


def test_pages_can_be_written_whatever_a_data_set_is_called():
    assert "caf\\xe9 &amp;" in html_page("caf\udce9 &", "").encode().decode()


def test_probabilities_that_are_no_numbers_are_an_error(monkeypatch):
    bad = piece_of(b"ab").piece
    bad.logprobs[1] = np.nan
    stream = object.__new__(TextStream)
    stream.prompts = (b"",)
    monkeypatch.setattr(TextStream, "__iter__", lambda self: iter([(bad,)]))
    for write in (
        generate_module.generate_texts,
        lambda stream: generate_module.stream_texts(stream, PlainTexts(False)),
    ):
        with pytest.raises(ConfigError, match="probabilities are not numbers"):
            write(stream)


def test_threads_other_than_the_first_have_commands_too(capsys):
    import threading

    codes = []

    def work():
        codes.append(compare.main(["--estimators", "nothing"]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert codes == [2]


def test_a_program_ends_with_the_code_of_its_command(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    # After an interrupt without what threads of libraries have to say of it.
    silent = []
    monkeypatch.setattr(launch, "to_nowhere", silent.append)
    before = signal.getsignal(signal.SIGINT)

    def stopped(error):
        raise error

    try:
        for main, code in (
            (lambda: 3, 3),
            (lambda: stopped(KeyboardInterrupt()), 130),
            (lambda: stopped(SystemExit(2)), 2),
            (lambda: stopped(SystemExit()), 0),
        ):
            with pytest.raises(SystemExit) as end:
                launch.program(main)
            assert end.value.code == code
            assert silent == [2] * (code == 130)
            silent.clear()
            assert signal.getsignal(signal.SIGINT) not in (before, signal.default_int_handler)
    finally:
        signal.signal(signal.SIGINT, before)
    assert jax.devices()
