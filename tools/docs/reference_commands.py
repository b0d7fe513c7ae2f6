"""The page of every command, read off the parsers of the command line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from functools import partial

from nlscale.cli.command import _parser

_WIDTH = 88
_LITERAL = re.compile(
    r"(?<![\w`.-])(?:--[a-z][a-z-]*[a-z]|/?[A-Za-z_][\w/-]+(?:\.[A-Za-z][\w-]+)+(?:=[\w.]+)?)(?!\w)"
)
"""Options, keys with or without a value, and file names."""
_INTRODUCTION = """# Commands

`python -m nlscale` is the same as `nlscale`. `--help` after any of them prints what is here.
"""


def page() -> str:
    """The page in Markdown."""
    parser = _parser()
    lines = [_INTRODUCTION, *_of(parser)]
    for name, verb in _verbs(parser).items():
        lines += _section(name, verb, 2)
        for sub, inner in _verbs(verb).items():
            lines += _section(f"{name} {sub}", inner, 3)
    return "\n".join(lines)


def anchors() -> list[str]:
    """The anchor of every verb, and of theirs."""
    return re.findall(r"^###? .* \{ #(\S+)", page(), re.MULTILINE)


def _section(name: str, parser: argparse.ArgumentParser, depth: int) -> Iterator[str]:
    yield f"{'#' * depth} {name} {{ #{name.replace(' ', '-')} }}\n"
    yield f"{_text(parser.description or '')}\n"
    yield from _of(parser)


def _of(parser: argparse.ArgumentParser) -> Iterator[str]:
    parser.formatter_class = partial(argparse.HelpFormatter, width=_WIDTH)  # type: ignore[assignment]
    usage = re.sub(rf"^(?:usage: | {{{len('usage: ')}}})", "", parser.format_usage(), flags=re.M)
    yield f"```text\n{usage.rstrip()}\n```\n"
    rows = list(_rows(parser))
    if rows:
        head = ["| argument | meaning |", "| --- | --- |"]
        yield "\n".join(['<div class="fields" markdown>\n', *head, *rows, "\n</div>\n"])


def _rows(parser: argparse.ArgumentParser) -> Iterator[str]:
    formatter = parser._get_formatter()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                anchor = f"{parser.prog} {choice.dest}".removeprefix("nlscale ").replace(" ", "-")
                yield f"| [`{choice.dest}`](#{anchor}) | {_text(choice.help or '', cell=True)} |"
        elif not isinstance(action, argparse._HelpAction):
            names = ", ".join(action.option_strings)
            value = "" if action.nargs == 0 else formatter._format_args(action, _metavar(action))
            shown = f"{names} {value}".strip().replace("|", "\\|")
            meaning = _text(formatter._expand_help(action), cell=True)
            required = " **Required.**" if action.option_strings and action.required else ""
            yield f"| `{shown}` | {meaning}{required} |"


def _metavar(action: argparse.Action) -> str:
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return action.dest.upper() if action.option_strings else action.dest


def _verbs(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _text(text: str, cell: bool = False) -> str:
    """Help as Markdown: options, keys and file names in it are code, the rest is as it is."""
    parts = re.split(r"(`[^`]*`)", text)
    for i in range(0, len(parts), 2):  # what is code already stands between
        plain = parts[i].replace("*", "\\*").replace("<", "&lt;")
        parts[i] = _LITERAL.sub(r"`\g<0>`", plain)
    text = "".join(parts)
    return text.replace("|", "\\|") if cell else text
