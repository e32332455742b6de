"""Models that run: whole, layer by layer, narrowed, and on many processes."""
