"""Token ids to text as they come: whole characters only, and nothing of a text that stops it."""

from __future__ import annotations

from collections.abc import Sequence

from nlscale.data.tokenizer import Tokenizer
from nlscale.errors import UserError

_UNKNOWN = "�"


class Detokenizer:
    """The text that each token adds to a sequence.

    A character may be spelt by several tokens; it is given with the last of them. What cannot be
    UTF-8 is given as U+FFFD, once the next token shows that it can become nothing else. All that
    was given is thus `decode` of all tokens but for a U+FFFD at the end.

    Args:
        tokenizer: of the ids.
        before: the last ids of what the text goes on from, in which a character may have begun and
            on which spaces may depend.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before)
        self._whole = 0
        """So many of the ids end with a whole character."""
        self._given = len(self._settled()[0])

    def push(self, token: int) -> str:
        """What the token adds; often nothing."""
        self._ids.append(token)
        text, all_of_it = self._settled()
        new, self._given = text[self._given :], len(text)
        if new and all_of_it:
            # What comes next needs no more than the ids since the last such place.
            self._ids, self._whole = self._ids[self._whole :], len(self._ids) - self._whole
            self._given = len(self._settled()[0])
        return new

    def _settled(self) -> tuple[str, bool]:
        """The text of the ids without a U+FFFD at the end, which may yet become a character; and
        whether there was none."""
        text = self._tokenizer.decode(self._ids)
        settled = text.removesuffix(_UNKNOWN)
        return settled, settled == text


class Stops:
    """Text up to the first of some texts that end it.

    Args:
        texts: each ends it; empty: none does.

    Raises:
        UserError: one is empty.
    """

    def __init__(self, texts: Sequence[str]) -> None:
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
