"""A package of somebody else: a router, a reduction, a chunker and an objective for Caesura, one idea a file."""
