"""That what the README shows works."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_library_example_runs(tmp_path):
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example is not None
    script = tmp_path / "example.py"
    script.write_text(example.group(1))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
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
