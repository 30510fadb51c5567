"""That what the README shows works."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import unet
from tests.compositions import registered

ROOT = Path(__file__).parent.parent


EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=["training", "hierarchy", "writing"])
def test_the_examples_run(example, tmp_path):
    (tmp_path / "my-model").mkdir()
    unet.save(registered("sfe"), tmp_path / "my-model")
    (tmp_path / "example.py").write_text(example)
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_file_the_readme_names_is_there():
    for name in set(
        re.findall(r"`((?:estimators|tests|docs)/[\w/.]+)`|\((docs/[\w.]+)\)", (ROOT / "README.md").read_text())
    ):
        path = name[0] or name[1]
        assert (ROOT / path).exists(), path
