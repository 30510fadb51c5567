"""How commands start: what the user asked of the interpreter, of JAX and of the folder is kept or named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import known_flags

ROOT = Path(__file__).parent.parent
RESTARTED = """
import os, sys
from experiments.launch import with_large_pages
{before}
with_large_pages()
print(sys.warnoptions, sys.flags.safe_path, sys.flags.utf8_mode, "GLIBC_TUNABLES" in os.environ, sys.argv[1:])
"""


def python(*arguments, folder=None, **environment):
    given = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "XLA_FLAGS")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**given, "PYTHONPATH": str(ROOT), **environment},
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


def test_a_platform_that_is_not_there_is_named(tmp_path):
    done = python("-m", "experiments.run", "--steps", "1", folder=tmp_path, JAX_PLATFORMS="abacus")
    assert done.returncode == 2
    assert "JAX_PLATFORMS is 'abacus'; unset it, or name cpu" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_users_own_number_of_devices_stands(tmp_path):
    code = "from experiments.launch import use_cpu_devices; import jax; use_cpu_devices(2); print(len(jax.devices()))"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "cpu"}
    assert python("-c", code, folder=tmp_path, **flags).stdout == "3\n"
    used = "import jax; jax.devices(); " + code
    assert python("-c", used, folder=tmp_path, JAX_PLATFORMS="cpu").stdout == "1\n"
