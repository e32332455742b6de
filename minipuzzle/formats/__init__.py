"""Number formats, which module gets which, and how they are laid out on disk."""
