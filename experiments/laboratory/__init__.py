"""Estimators against exact answers, on models small enough to try every boundary string."""
