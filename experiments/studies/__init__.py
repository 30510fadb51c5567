"""Studies that papers made, as files for `python -m experiments.compare`."""
