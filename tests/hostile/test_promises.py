"""What SECURITY.md promises of the library itself: what it calls, what it does when it is imported, what it depends on."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PACKAGES = ("data", "estimators", "unet", "experiments")

FORBIDDEN = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "__import__", "shell="}

IMPORT_ALL = """
import sys
def watch(event, arguments):
    if event.split(".")[0] == "socket" and event not in ("socket.__new__", "socket.gethostname"):
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(watch)
import data, estimators, estimators.testing, unet
import experiments.run, experiments.compare, experiments.export, experiments.generate, experiments.lab, experiments.words
import experiments.explore
assert experiments.launch.os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
"""


def _calls(path: Path) -> Iterator[tuple[str, int]]:
    """What a file calls, with line numbers; a call with the keyword `shell` counts as `shell=` too."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno
            if any(keyword.arg == "shell" for keyword in node.keywords):
                yield "shell=", node.lineno


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_evaluates_text_or_unpickles_freely(package):
    for path in (ROOT / package).rglob("*.py"):
        for name, line in _calls(path):
            assert name not in FORBIDDEN, f"{path}, line {line}"


def test_nothing_is_asked_of_the_network_when_everything_is_imported():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _versions(path: Path) -> dict[str, str]:
    found = re.findall(r"^\|? ?([\w.-]+)(?:==| \| )([\w.]+)", path.read_text(), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found if version[0].isdigit()}


def test_hashes_and_licences_are_those_of_the_constraints():
    constraints = _versions(ROOT / "constraints.txt")
    assert _versions(ROOT / "docs/dependencies.md") == constraints
    # Both lists are of versions for Linux and Python 3.11 to 3.13; the hashes know other systems and no CUDA compiler.
    locked = _versions(ROOT / "requirements-locked.txt")
    assert {name: constraints[name] for name in locked if name in constraints} == {
        name: version for name, version in locked.items() if name in constraints
    }
    unlocked = {name for name in constraints.keys() - locked.keys() if not name.startswith(("nvidia-", "jax-cuda"))}
    assert not unlocked
    assert re.search(r"--hash=sha256:[0-9a-f]{64}$", (ROOT / "requirements-locked.txt").read_text())
