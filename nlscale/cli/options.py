"""Options that no command has: the nearest that it does have."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence

_NEAR = 0.6


def unknown_option(
    parser: argparse.ArgumentParser, arguments: Sequence[str], anywhere: Iterable[str]
) -> tuple[argparse.ArgumentParser, str] | None:
    """The first option among the arguments that the command they name does not have.

    Args:
        parser: of all commands; commands of commands are followed.
        arguments: of the command line.
        anywhere: options that every command takes besides its own.

    Returns:
        The parser of the command, and a sentence on the option and the nearest; None: it has all.
    """
    for argument in arguments:
        commands = _commands(parser)
        if argument not in commands:
            break
        parser = commands[argument]
    known = {*parser._option_string_actions, *anywhere}
    for argument in arguments:
        if argument == "--":  # what follows are no options
            return None
        name = argument.partition("=")[0]
        # One that begins another is that, and one with a space is a text, as argparse has it.
        if not name.startswith("--") or " " in argument or any(k.startswith(name) for k in known):
            continue
        near = difflib.get_close_matches(name, sorted(known), 1, _NEAR)
        return parser, f"there is no {name}{f'; the nearest is {near[0]}' if near else ''}"
    return None


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers under it, by name."""
    return {
        name: command
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for name, command in action.choices.items()
    }
