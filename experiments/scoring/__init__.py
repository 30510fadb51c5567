"""Evaluation of models on texts: what `experiments.evaluate` is made of."""
