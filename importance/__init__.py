"""Measuring: how much the model loses without a layer, a channel, a head."""
