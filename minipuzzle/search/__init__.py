"""From scores and limits to candidates and plans, in seconds and without weights."""
