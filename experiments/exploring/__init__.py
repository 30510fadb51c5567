"""The page of `experiments.explore`: models that are asked about a text while it is typed."""
