"""Commands that run or show all steps at once."""
