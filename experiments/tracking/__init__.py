"""Where a run sends what it measures, beside its own files."""
