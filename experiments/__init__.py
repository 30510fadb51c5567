"""Training, evaluation and reports: everything a user runs."""
