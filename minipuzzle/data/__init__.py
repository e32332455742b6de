"""Text: documents, token windows and blends."""
