"""Abilities: what a model can still do, item by item, compared with the model it was made from."""
