"""The command line, one file for each verb."""

from .main import main

__all__ = ["main"]
