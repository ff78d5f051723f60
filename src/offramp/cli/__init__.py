"""The command line."""

from offramp.cli.app import main

__all__ = ["main"]
