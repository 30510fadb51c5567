"""Settings of a run: their definitions, presets, and how they become a model."""
