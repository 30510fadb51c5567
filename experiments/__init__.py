"""Training, evaluation and reports: everything a user runs."""

import sys

from experiments.launch import begin, hidden_package

# While `python -m` looks for a command, before that command could say anything.
if sys.argv[:1] == ["-m"]:
    begin()
elif (_hidden := hidden_package()) is not None:
    raise ImportError(_hidden)
