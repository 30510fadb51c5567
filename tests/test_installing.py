"""That the Makefile keeps environments apart, and installs what the tests can use."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
# What a make around the tests hands on to every make inside it.
HANDED_ON = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHON", "CONSTRAINTS", "ARGS")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What `make test` would do, from the beginning."""
    usual = {name: value for name, value in os.environ.items() if name not in HANDED_ON}
    command = ["make", "--dry-run", "--always-make", "test", *arguments]
    return subprocess.run(command, cwd=ROOT, env=usual, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "folder", "constraint"),
    [
        ((), ".venv", "constraints.txt"),
        ((f"PYTHON={sys.executable}",), f".venv-{VERSION}", "constraints.txt"),
        (("CONSTRAINTS=",), ".venv-newest", None),
        ((f"PYTHON={sys.executable}", "CONSTRAINTS="), f".venv-{VERSION}-newest", None),
        (("CONSTRAINTS=requirements-locked.txt",), ".venv-requirements-locked", "requirements-locked.txt"),
    ],
)
def test_environments_of_other_pythons_and_other_versions_are_not_mixed(arguments, folder, constraint):
    commands = dry_run(*arguments).stdout
    assert set(re.findall(r"\S+(?=/bin/)", commands.replace(sys.executable, "python"))) == {folder}
    assert re.findall(r"-m venv (\S+)", commands) == [folder]
    assert set(re.findall(r"--constraint (\S+)", commands)) == ({constraint} if constraint else set())


def test_a_python_that_is_not_there_is_named():
    done = dry_run("PYTHON=python2.0")
    assert done.returncode != 0
    assert "PYTHON=python2.0 is no Python that starts" in done.stderr


def test_extras_are_installed_one_by_one_where_they_cannot_be_together():
    [extras] = re.findall(r"^EXTRAS := (.*)$", MAKEFILE, re.MULTILINE)
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert groups["test"] == [f"caesura-lm[tools,{','.join(extras.split())}]"]
