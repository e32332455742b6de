"""Cutting: the plan, the scores it follows from, the choice of units, and the surgery on tensors."""
