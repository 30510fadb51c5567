"""That the recipes say what the commands understand."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from experiments.config.presets import PRESETS
from experiments.run import parse

RECIPES = Path(__file__).parent.parent / "recipes"
FAKE_PYTHON = '#!/bin/sh\nprintf "%s\\n" "$@" > "$GIVEN"\n'


def test_there_is_one_for_each_scheduler():
    assert sorted(path.name for path in RECIPES.iterdir()) == ["jobset.yaml", "skypilot.yaml", "slurm.sh"]


def given(script, folder, **environment):
    """The arguments that a script gives to Python, whatever else it calls."""
    for name in ("python", "srun", ".venv/bin/python"):
        path = folder / name if "/" in name else folder / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n' if name == "srun" else FAKE_PYTHON
        )
        path.chmod(0o755)
    written = folder / "given"
    done = subprocess.run(
        ["/bin/sh", "-c", script],
        cwd=folder,
        env={"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "GIVEN": str(written), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    arguments = written.read_text().splitlines()
    assert arguments[:2] == ["-m", "experiments.run"]
    return arguments[2:]


def skypilot():
    recipe = yaml.safe_load((RECIPES / "skypilot.yaml").read_text())
    places = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    return recipe["run"], {**recipe["envs"], **places}, ("10.0.0.1:12345", recipe["num_nodes"], 1)


def jobset():
    recipe = yaml.safe_load((RECIPES / "jobset.yaml").read_text())
    [jobs] = recipe["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    # The first pod of the only job, as JobSet calls it.
    host = f"{recipe['metadata']['name']}-{jobs['name']}-0-0.{recipe['metadata']['name']}"
    mounted = {one["name"] for one in container["volumeMounts"]}
    assert mounted == {one["name"] for one in job["template"]["spec"]["volumes"]}
    environment = {one["name"]: one["value"] for one in container["env"]} | {"JOB_COMPLETION_INDEX": "3"}
    return container["args"][0], environment, (f"{host}:12345", job["parallelism"], 3)


def slurm():
    return f". {shlex.quote(str(RECIPES / 'slurm.sh'))}", {}, (None, None, None)


@pytest.mark.parametrize("recipe", [skypilot, jobset, slurm])
def test_a_recipe_begins_a_run_and_goes_on_with_it(recipe, tmp_path):
    script, environment, place = recipe()
    environment["OUT"] = str(tmp_path / "out")
    config = parse(given(script, tmp_path, **environment))
    assert (config.distributed.coordinator, config.distributed.processes, config.distributed.index) == place
    assert config.model in PRESETS
    assert config.mesh.fsdp == 8
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()
    again = given(script, tmp_path, **environment)
    assert "--resume" in again
    assert "--model" not in again


def test_the_slurm_script_is_a_script_of_bash():
    if (bash := shutil.which("bash")) is not None:
        subprocess.run([bash, "-n", str(RECIPES / "slurm.sh")], check=True)
    lines = re.findall(r"^#SBATCH --([\w-]+)", (RECIPES / "slurm.sh").read_text(), re.MULTILINE)
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "signal"} <= set(lines)
