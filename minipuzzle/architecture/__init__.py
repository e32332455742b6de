"""What a model is, without torch: layers and their kinds, families, memory, deployments, quantities."""
