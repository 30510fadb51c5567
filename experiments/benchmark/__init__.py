"""Measurements on this machine, each against an alternative in the same run."""
