"""Token ids to text as they come: whole characters only, and nothing of a text that stops it."""

from __future__ import annotations

from collections.abc import Sequence

from nlscale.data.tokenizer import Tokenizer
from nlscale.errors import UserError

_UNKNOWN = "�"
_UNDECIDED = 3
"""The last bytes that may yet become a character, which has 4 at most."""
_WINDOW = 32
"""Ids that are decoded at most; half of them stay where a text of broken bytes never settles."""


class Detokenizer:
    """The text that each token adds to a sequence.

    A character may be spelt by several tokens; it is given with the last of them. What cannot be
    UTF-8 is given as U+FFFD, once the next tokens show that it can become nothing else. All that
    was given is thus `decode` of all tokens but for some U+FFFD at the end, 3 at most of bytes that
    cannot become anything else. (A tokenizer that falls back to bytes decodes a whole run of them
    as U+FFFD where one of it is broken; what was given of that run before stays.)

    Args:
        tokenizer: of the ids.
        before: the last ids of what the text goes on from, in which a character may have begun and
            on which spaces may depend.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = [i for i in before if i != tokenizer.separator]
        self._whole = 0
        """So many of the ids end with a whole character."""
        self._given = 0
        # The first ids may be the end of a character, the last ones the beginning of one: either
        # breaks a run of bytes around it.
        for end in range(len(self._ids), max(0, len(self._ids) - _UNDECIDED - 1), -1):
            for start in range(min(end, _UNDECIDED + 1)):
                text = tokenizer.decode(self._ids[start:end])
                if text and not text.endswith(_UNKNOWN):
                    self._ids, self._whole = self._ids[start:], end - start
                    self._given = max(len(text), len(self._settled()[0]))
                    return
        self._given = len(self._settled()[0])

    def push(self, token: int) -> str:
        """What the token adds; often nothing."""
        if token == self._tokenizer.separator:  # which is no text
            return ""
        self._ids.append(token)
        text, held = self._settled()
        new = text[self._given :]
        self._given = max(self._given, len(text))
        if new and not held:
            # What comes next needs no more than the ids since the last such place.
            self._ids, self._whole = self._ids[self._whole :], len(self._ids) - self._whole
            self._given = len(self._settled()[0])
        elif len(self._ids) > _WINDOW:
            gone = len(self._ids) - _WINDOW // 2
            rest = len(text) + held - self._given
            self._ids, self._whole = self._ids[gone:], max(0, self._whole - gone)
            self._given = max(0, len(self._tokenizer.decode(self._ids)) - rest)
        return new

    def _settled(self) -> tuple[str, int]:
        """The text of the ids without the U+FFFD at the end that may yet become a character; and
        how many these are."""
        text = self._tokenizer.decode(self._ids)
        held = len(text) - len(text.rstrip(_UNKNOWN))
        if len(self._ids) - self._whole > _UNDECIDED:
            held = min(held, _UNDECIDED)
        return text[: len(text) - held], held


class Stops:
    """Text up to the first of some texts that end it.

    Args:
        texts: each ends it; empty: none does.

    Raises:
        UserError: one is empty.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        if any(not isinstance(text, str) for text in texts):
            raise UserError(f"a stop is a text, or several; {list(texts)!r} has others")
        if any(not text for text in texts):
            raise UserError("a stop is empty, and would end every text before it begins")
        self._texts = texts
        self._held = ""
        self.found = False
        """Whether one has come; then the text is over."""

    def push(self, text: str) -> str:
        """What can be given now: the end is held back while a stop may have begun in it."""
        held = self._held + text
        places = [place for stop in self._texts if (place := held.find(stop)) >= 0]
        if places:
            self._held, self.found = "", True
            return held[: min(places)]
        keep = max((_begun(held, stop) for stop in self._texts), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def rest(self) -> str:
        """What was held back, where no more comes."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """How many characters of `stop` the text ends with, fewer than all."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
