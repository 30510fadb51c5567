"""Benchmarks on this machine. Each measures alternatives in the same process."""
