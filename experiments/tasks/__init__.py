"""Tasks of lm-evaluation-harness: what `experiments.evaluate --tasks` and `experiments.harness` are made of."""
