"""The page of a run: one file that shows what was made, from what, by what, and how good it is."""
