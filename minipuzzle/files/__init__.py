"""What lies on disk: JSON, safetensors, checkpoint folders, and outputs that appear whole or not at all."""
