"""One thin file a command: options in, core functions called, result printed."""
