"""Deployment formats: BF16, FP8 and NVFP4 folders that serving engines load, verified by our own reader."""
