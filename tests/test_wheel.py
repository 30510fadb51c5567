"""That the wheel holds everything, and that what it installs works from another folder."""

import importlib
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("data", "estimators", "experiments", "unet")


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A copy, since building leaves files behind.
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False).stdout.split(b"\0")
    names = [Path(os.fsdecode(one)) for one in tracked if one] or _without_git()
    for name in names:
        if (name.parts[0] in PACKAGES or len(name.parts) == 1) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, source)
    [path] = folder.glob("*.whl")
    return path


def _without_git():
    suffixes = (".py", ".toml", ".typed", ".json", ".md")
    found = [*ROOT.glob("*"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*"))]
    return [path.relative_to(ROOT) for path in found if path.suffix in suffixes or path.name in ("LICENSE", "py.typed")]


def test_the_wheel_holds_every_file_of_every_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= held


def test_an_installed_command_runs_from_another_folder(wheel, tmp_path):
    prefix = tmp_path / "installed"
    pip("install", "--no-deps", "--no-index", "--no-compile", "--prefix", prefix, wheel)
    [installed] = prefix.rglob("experiments")
    assert {path.name for path in (prefix / "bin").iterdir()} == set(PROJECT["scripts"])
    environment = {**os.environ, "PYTHONPATH": str(installed.parent), "JAX_PLATFORMS": "cpu"}
    command = [prefix / "bin" / "caesura-shade", "nowhere", "--text", "a"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert " ".join(done.stderr.split()).startswith("error: there is no file or folder nowhere")


def test_every_command_is_a_script_and_every_script_a_command():
    commands = {
        path.stem for path in (ROOT / "experiments").glob("*.py") if "\n    program(main)\n" in path.read_text()
    }
    assert {name.removeprefix("caesura-") for name in PROJECT["scripts"]} == commands
    for target in PROJECT["scripts"].values():
        module, name = target.split(":")
        assert callable(getattr(importlib.import_module(module), name))
