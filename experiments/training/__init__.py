"""The training of a model: its loop and everything that the loop uses."""
