"""Recovery data, verb by verb; ``api`` has them all."""
