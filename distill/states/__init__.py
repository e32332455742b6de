"""What a run leaves: states to continue from, records of its steps, the trained checkpoint."""
