"""Putting tasks to models, and comparing what they answer."""
