"""Training, evaluation and reports: everything a user runs."""

import os
import sys

from experiments.launch import begin, hidden_package

# While `python -m` looks for a command, before that command could say anything.
if sys.argv[:1] == ["-m"]:
    begin()
elif (_hidden := hidden_package()) is not None:
    raise ImportError(_hidden)

# The hub's client reads this when it is imported, and would send the versions of installed packages with its requests.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
