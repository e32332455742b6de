"""Tasks: how items are made and scored."""
