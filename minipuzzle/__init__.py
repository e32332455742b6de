"""MiniPuzzle makes large language models smaller: measure, search, cut, distil, export."""

__version__ = "0.1.0"
