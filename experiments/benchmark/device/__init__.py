"""What `experiments.bench gpu` measures, part by part."""
