"""How commands start: what the user asked of the interpreter, of JAX and of the folder is kept or named."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments.config.errors import ConfigError
from experiments.devices import use_cpu_devices
from tests.conftest import known_flags

ROOT = Path(__file__).parent.parent
RESTARTED = """
import os, sys
from experiments.launch import with_large_pages
{before}
with_large_pages()
print(sys.warnoptions, sys.flags.safe_path, sys.flags.utf8_mode, "GLIBC_TUNABLES" in os.environ, sys.argv[1:])
"""


def python(*arguments, folder=None, path=(), **environment):
    """What a new interpreter makes of these arguments. None of these gets as far as importing JAX, which takes seconds."""
    given = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "XLA_FLAGS")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**given, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_flags_that_this_jaxlib_does_not_know_are_left_out():
    known = "--xla_force_host_platform_device_count=1"
    assert known_flags("--xla_no_such_flag=1", known) == [known]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory settings are those of Linux")
@pytest.mark.parametrize(
    ("before", "again"), [("", True), ("sys.settrace(lambda *_: None)", False)], ids=["plain", "traced"]
)
def test_memory_settings_lose_no_option_of_the_interpreter_and_no_debugger(before, again):
    done = python(
        "-W", "error::UserWarning", "-P", "-X", "utf8", "-c", RESTARTED.format(before=before), "--flag", "a b"
    )
    assert done.stdout == f"['error::UserWarning'] True 1 {again} ['--flag', 'a b']\n", done.stderr


def test_a_module_that_hides_a_package_is_named(tmp_path):
    (tmp_path / "data.py").write_text("")
    done = python("-m", "experiments.run", "--help", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the package data of this library is hidden by another module of that name")
    assert "Traceback" not in done.stderr


FIRST_IMPORT = """
import os, signal, sys
os.fstat(0), os.fstat(1), os.fstat(2)  # open, or the next file would be taken for one of them
os.write(1, f"{'MPLBACKEND' in os.environ} {sys.stdout and sys.stdout.errors}\\n".encode())
os.kill(os.getpid(), signal.SIGINT)
raise AssertionError("went on")
"""


@pytest.mark.parametrize("command", ["run", "export"])
def test_commands_are_stopped_while_they_import_and_keep_nothing_of_a_notebook(tmp_path, command):
    """Something that is imported first stands in for seconds of imports."""
    (tmp_path / "jax.py").write_text(FIRST_IMPORT)
    backend = "module://matplotlib_inline.backend_inline"
    done = python(
        "-m", f"experiments.{command}", "--help", path=[tmp_path], MPLBACKEND=backend, PYTHONIOENCODING="ascii"
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "False replace\n", "stopped\n")


@pytest.mark.skipif(os.name != "posix", reason="closed streams as shells of Unix close them")
def test_closed_streams_are_no_place_for_files(tmp_path):
    (tmp_path / "jax.py").write_text(FIRST_IMPORT)
    line = f'exec "{sys.executable}" -m experiments.run >&- <&- 2>&-'
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    assert subprocess.run(["sh", "-c", line], env=environment, check=False).returncode == 130


def test_a_platform_that_is_not_there_is_named(monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'abacus'\nmore")

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    with pytest.raises(ConfigError, match="JAX_PLATFORMS is 'abacus'; unset it, or name cpu"):
        use_cpu_devices(2)


@pytest.mark.parametrize("cores", [{1}, {0, 3}, {0, 1, 2, 3}])
def test_a_process_that_is_bound_to_some_cores_counts_these(monkeypatch, cores):
    asked = []
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: cores)
    monkeypatch.setattr(jax.config, "update", lambda *setting: asked.append(setting))
    use_cpu_devices(2)
    assert asked == [("jax_num_cpu_devices", min(2, len(cores)))]


def test_the_users_own_number_of_devices_stands(monkeypatch):
    here = len(jax.devices())
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda *setting: asked.append(setting))
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    use_cpu_devices(2)
    assert asked == []
    monkeypatch.undo()
    # JAX has been used.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    use_cpu_devices(1)
    assert len(jax.devices()) == here
