"""The version of this package: setup.py, score files and model cards read it here."""

__version__ = "0.1.0"
