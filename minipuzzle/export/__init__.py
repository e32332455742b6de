"""Deployment formats: BF16 and FP8 folders that serving engines load, verified by our own reader."""
