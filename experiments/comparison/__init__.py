"""Comparing runs: statistics, tables and figures."""
