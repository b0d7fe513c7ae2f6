r"""Text on its way into a script: what a shell, or sbatch, will read back as the same text.

sbatch reads the words of an #SBATCH line by rules of its own: single and double quotes group, a
backslash takes the next character as it is, also between quotes, and an unquoted # begins a
comment. Where the line holds `hetjob` or `packjob`, in quotes or not, it takes it for the beginning
of another part of a heterogeneous job, and blanks the word. In the name of an output file %j and
such are replaced, %% is a percent sign, and any backslash turns that off.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from nlscale.errors import UserError

_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
_PARTS_OF_A_JOB = re.compile("(het|pack)(job)", re.IGNORECASE)
_NAMED = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def shell(text: str, bare: bool = True) -> str:
    r"""A text as one word of bash, on one line.

    Control characters, backslashes, and bytes of a path that are no UTF-8 stand in $'...'.

    Args:
        text: any.
        bare: without quotes where it needs none.

    Raises:
        UserError: it holds a NUL or half a character, which no shell can pass on.
    """
    if bare and _PLAIN.fullmatch(text):
        return text
    if "\0" in text or any(_is_half(character) for character in text):
        raise UserError(
            f"{text!r} holds a NUL or half a character, which no shell can pass on; leave it out"
        )
    if not any(c == "\\" or _is_control(c) or _is_byte(c) for c in text):
        return "'" + text.replace("'", "'\\''") + "'"
    return "$'" + "".join(map(_escaped, text)) + "'"


def shell_words(words: Iterable[str], bare: bool = True) -> str:
    """Several words of bash, on one line; arguments and errors as those of `shell`."""
    return " ".join(shell(word, bare) for word in words)


def sbatch(word: str, what: str) -> str:
    """A word of an #SBATCH line.

    Args:
        word: such as --comment=a b.
        what: the key it comes from, which the error names.

    Raises:
        UserError: it holds what cannot stand in such a line.
    """
    refuse_control(word, what)
    if _PLAIN.fullmatch(word) and not _PARTS_OF_A_JOB.search(word):
        return word
    escaped = re.sub(r'["\\]', r"\\\g<0>", word)
    return '"' + _PARTS_OF_A_JOB.sub(r"\1\\\2", escaped) + '"'


def log_file(path: str, pattern: str, what: str) -> str:
    """The name of an output file, as --output takes it.

    Args:
        path: of the folder, taken as it is.
        pattern: of the file in it, with Slurm's replacements such as %j.
        what: the key that the folder comes from, which the error names.

    Raises:
        UserError: a backslash, which Slurm drops, with its replacements.
    """
    if "\\" in path:
        raise UserError(
            f"{what} {path!r} holds a backslash, which Slurm drops from the name of its log; use "
            f"a folder without"
        )
    return f"{path.replace('%', '%%')}/{pattern}"


def refuse_control(text: str, what: str) -> None:
    """Refuse a text that cannot stand on one line of UTF-8.

    Raises:
        UserError: a control character, such as a newline, or bytes that are no UTF-8.
    """
    if any(_is_control(character) for character in text):
        raise UserError(f"{what} {text!r} holds a newline or another control character; remove it")
    if any(_is_byte(character) or _is_half(character) for character in text):
        raise UserError(f"{what} {text!r} is not UTF-8, as Slurm's scripts are; use another name")


def _is_control(character: str) -> bool:
    return character < " " or character == "\x7f"


def _is_byte(character: str) -> bool:
    """Whether it stands for a byte that Python could not decode."""
    return "\udc80" <= character <= "\udcff"


def _is_half(character: str) -> bool:
    """Whether it is half a pair of UTF-16, and stands for no byte."""
    return "\ud800" <= character <= "\udfff" and not _is_byte(character)


def _escaped(character: str) -> str:
    if _is_byte(character):
        return f"\\x{ord(character) - 0xDC00:02x}"
    if character in _NAMED:
        return _NAMED[character]
    return f"\\x{ord(character):02x}" if _is_control(character) else character
