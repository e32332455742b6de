"""Text that a model writes: dialogues, rewritings, instructions, rewards, preferences, shorter traces."""
