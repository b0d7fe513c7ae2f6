"""The documentation as its tests read it: which pages there are, and the commands they show."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_GENERATED = "docs/reference/"  # made while the site is built; left over where someone has built it
_FIRST = ("README.md", "docs/index.md", "docs/start.md")
_ROOMS = ("how-to", "concepts", "design")
# A # begins a comment as it does for bash: neither in quotes nor inside a word.
_LINE = re.compile(r"""((?:'[^']*'|"[^"]*"|[^'"#]|(?<=\S)#)*)(?:#(.*))?""", re.DOTALL)


def _order(page: str) -> tuple[int, int, str]:
    room = page.split("/")[1] if page.count("/") > 1 else ""
    return (
        _FIRST.index(page) if page in _FIRST else len(_FIRST),
        _ROOMS.index(room) if room in _ROOMS else len(_ROOMS),
        page,
    )


def _pages() -> list[str]:
    """Relative to the repository, in the order in which a newcomer reads them."""
    found = (str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
    return sorted(["README.md", *(p for p in found if not p.startswith(_GENERATED))], key=_order)


PAGES = _pages()


@dataclass(frozen=True)
class Command:
    """A line of a page that a reader is meant to type, continuation lines joined."""

    text: str
    """Without its comment."""
    long: bool = False
    """Whether its comment says `takes ... minutes` or `hours`."""

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def same(self) -> str:
        """Alike for commands that name a recipe that comes with nlscale by path or by name."""
        named = re.sub(r"\brecipes/(?:clusters/|sweeps/)?([\w.-]+)\.yaml", r"\1", self.text)
        return " ".join(named.split())


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page: str) -> list[Command]:
    """Of the page's bash blocks, in their order."""
    return [_command(line) for line in _lines(page, "bash") if not line.lstrip().startswith("#")]


def shown(page: str) -> list[Command]:
    """Commands of nlscale that the page shows but cannot run everywhere: of its text blocks."""
    typed = re.compile(r"(?:\$ )?nlscale [a-z-]+ ")
    lines = (line.strip() for line in _lines(page, "text"))
    return [_command(line.removeprefix("$ ")) for line in lines if typed.match(line)]


def _lines(page: str, language: str) -> list[str]:
    blocks = re.findall(rf"^ *```{language}\n(.*?)^ *```", text_of(page), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip()]


def _command(line: str) -> Command:
    match = _LINE.fullmatch(line)
    assert match, f"quotes are not closed on one line: {line}"
    text, comment = match.groups()
    long = re.search(r"\btakes\b.*\b(?:minutes?|hours?)\b", comment or "") is not None
    return Command(text.strip(), long)
