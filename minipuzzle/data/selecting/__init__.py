"""Which text is worth training on: measures, quality buckets, likeness to a target, shares of sources."""
