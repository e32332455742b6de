"""Playing: prompts in graphs, worlds of text, and agents in them."""
