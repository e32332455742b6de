"""One module for each verb: everything a command does between its options and what it prints."""
