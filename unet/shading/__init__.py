"""Texts with their boundaries, for terminals, notebooks and pages."""
