"""What is timed: one file per level, collected by `pytest bench/ --benchmark-only`."""
