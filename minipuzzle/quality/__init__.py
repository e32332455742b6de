"""What a model does on text: one measurement for every command."""
