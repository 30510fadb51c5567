"""Training, evaluation and reports: everything a user runs."""

import os
import sys

from experiments.launch import hidden_package

if (_hidden := hidden_package()) is not None:
    # While `python -m` looks for a command, before that command could say anything.
    if sys.argv[:1] == ["-m"]:
        print(f"error: {_hidden}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(_hidden)

# The hub's client reads this when it is imported, and would send the versions of installed packages with its requests.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
