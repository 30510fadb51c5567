"""Comparison of runs: statistics, tables and figures."""
