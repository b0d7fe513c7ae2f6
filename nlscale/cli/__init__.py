"""The command line: a file a verb, each a few lines that call a room."""

from nlscale.cli.command import main

__all__ = ["main"]
