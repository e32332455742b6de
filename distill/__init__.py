"""Recovering: a cut model learns from the model it was cut from."""
