"""What a run shows: progress on the terminal, a summary, a report."""
