"""Who may import whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("estimators", "unet", "data", "experiments")


# The contract of estimators runs them inside a whole model: the one part of `estimators` that uses `unet`.
CONTRACT = ROOT / "estimators" / "testing"


def imports_of(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield path, node.module or ""


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("estimators", ("unet", "data", "experiments")),
        ("unet", ("data", "experiments")),
        ("data", ("estimators", "unet", "experiments")),
    ],
)
def test_packages_import_only_what_lies_below_them(package, forbidden):
    found = [(path, name) for path, name in imports_of(package) if name.split(".")[0] in forbidden]
    assert [(path.name, name) for path, name in found if path.parent != CONTRACT] == []
    assert {name.split(".")[0] for _, name in found} <= {"unet"}


def test_nothing_of_the_library_imports_the_contract():
    users = {
        path for package in PACKAGES for path, name in imports_of(package) if name.startswith("estimators.testing")
    }
    assert users
    assert {path.parent for path in users} == {CONTRACT}


def test_unet_knows_only_the_abstract_kinds_of_estimators():
    # A published model is a composition of both packages; these modules alone put it together.
    layouts = {"hnet_layout", "blt_layout"}
    names = {
        name for path, name in imports_of("unet") if name.split(".")[0] == "estimators" and path.stem not in layouts
    }
    # Beside the abstract kinds, what is of no estimator: equations, decode states, how keys of random numbers are split, how
    # parts are found by name, and the bounds of numbers.
    assert names == {
        "estimators.base",
        "estimators.bounds",
        "estimators.decode_state",
        "estimators.equations",
        "estimators.keys",
        "estimators.lookup",
        "estimators.sharding",
    }


COMMANDS = {
    *("run", "runs", "generate", "compare", "evaluate", "export", "explore"),
    *("harness", "lab", "bench", "shade", "words"),
}
BELOW = {"launch", "terminal"}
"""What stands below all rooms: how a process begins, and what may be sent to a terminal."""
ABOVE = {"command", "devices", "scripts"}
"""What only commands use: how they end, the devices that they run on, and what they are called once installed."""
INNER = {"config", "training", "evaluation", "reporting"}
ROOMS = {"processes", *INNER, "scoring", "comparison", "laboratory", "benchmark", "tasks", "tracking", "exploring"}


def test_commands_stand_at_the_top_of_experiments_and_everything_else_in_a_room():
    top = ROOT / "experiments"
    assert {path.stem for path in top.glob("*.py")} == {*COMMANDS, *BELOW, *ABOVE, "__init__"}
    # Studies are files of settings.
    assert {path.parent.name for path in top.glob("*/*.py")} == {*ROOMS, "studies"}
    assert all("\ndef main(" in (top / f"{name}.py").read_text() for name in COMMANDS)


@pytest.mark.parametrize(
    ("room", "may_use"),
    [
        ("config", set()),
        ("evaluation", {"config"}),
        ("processes", {"config", "reporting"}),
        ("training", {"config", "evaluation", "processes", "reporting"}),
        ("reporting", {"config", "evaluation", "training"}),
        ("tracking", INNER),
        ("comparison", INNER),
        ("scoring", {*INNER, "comparison"}),
        ("tasks", {*INNER, "scoring"}),
        ("exploring", {*INNER, "scoring"}),
        ("laboratory", {*INNER, "comparison", "scoring"}),
        ("benchmark", {*INNER, "comparison", "scoring"}),
    ],
)
def test_rooms_use_only_what_lies_below_them_and_no_command(room, may_use):
    used = {name.split(".")[1] for _, name in imports_of(f"experiments/{room}") if name.startswith("experiments.")}
    assert used <= may_use | {room} | BELOW


@pytest.mark.parametrize("module", sorted(BELOW))
def test_what_stands_below_all_rooms_needs_the_standard_library_only(module):
    tree = ast.parse((ROOT / "experiments" / f"{module}.py").read_text())
    names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in names if name.split(".")[0] in PACKAGES} <= {f"experiments.{one}" for one in BELOW}


def test_private_parts_of_jax_are_imported_by_processes_of_a_group_only():
    """And so by no command at its start: a version of JAX may move them."""
    private = ("jax._src", "jaxlib", "experiments.processes.peers")
    found = {
        (path.name, name)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.parse(path.read_text()).body
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        if name.startswith(private)
    }
    assert found == {("peers.py", "jax._src")}


def test_functions_of_experiments_are_short_and_take_few_parameters():
    long = []
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                parameters = [a.arg for a in (*node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
                if lines > 60 or len(parameters) > 8:
                    long.append(f"{path.relative_to(ROOT)}: {node.name}, {lines} lines, {len(parameters)} parameters")
    assert long == []


def test_every_package_was_looked_at():
    for package in PACKAGES:
        assert list(imports_of(package)), package
