"""How prune decides between candidates: measured comparison, refinement, and the frontier of many budgets."""
