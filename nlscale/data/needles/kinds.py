"""The kinds of questions, and the two forms that they are asked in (RULER, Hsieh et al., 2024).

A new kind, or form, takes a line. `ruler` is what RULER asks, word by word; `short` is the same
question without the words around it, for contexts of a few hundred bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
"""The haystack of `noise`, over and over."""


@dataclass(frozen=True)
class Kind:
    """A kind of question."""

    about: str
    haystack: str
    """`noise`, `text`, or `needles`: others like those that are asked for."""
    keys: int = 1
    """With values in the haystack; of `needles` as many more as there is room for."""
    values: int = 1
    """Of each key."""
    asked: int = 1
    """Keys that are asked for, whose values are the answer."""
    uuid_keys: bool = False
    """UUIDs, instead of two words."""
    uuid_values: bool = False
    """UUIDs, instead of seven digits."""
    hops: int = 0
    """Of a chain of variables that have one value, by each other; 0: keys and values."""


KINDS: dict[str, Kind] = {
    "s1": Kind("one number in a sentence repeated", "noise"),
    "s2": Kind("one number in text", "text"),
    "s3": Kind("one UUID in text", "text", uuid_values=True),
    "mk1": Kind("one number of four in text", "text", keys=4),
    "mk2": Kind("one number, among numbers alone", "needles"),
    "mk3": Kind(
        "one UUID of a UUID, among these alone", "needles", uuid_keys=True, uuid_values=True
    ),
    "mv": Kind("four numbers of one key in text", "text", values=4),
    "mq": Kind("the numbers of four keys in text", "text", keys=4, asked=4),
    "vt": Kind("all variables of a chain of four hops", "noise", hops=4),
}


@dataclass(frozen=True)
class Form:
    """How needles and questions are worded. `{}` in their order: see each."""

    needle: str
    """Key, value; with `{values}`: the plural of what values are."""
    before: tuple[str, str]
    """What comes before the haystack, of one value and of several; `{what}` they are."""
    question: tuple[str, str]
    """What comes after it, `{keys}` being asked for; the answer follows."""
    chain: tuple[str, str]
    """A variable's value, and a variable's variable; name first."""
    chain_before: str
    chain_question: str
    """Of all variables that have a `{value}`, of which there are `{count}`."""


FORMS: dict[str, Form] = {
    "short": Form(
        needle="{key} is {value}.",
        before=("", ""),
        question=("\n{keys} is", "\n{keys} are"),
        chain=("{name} = {value}.", "{name} = {value}."),
        chain_before="",
        chain_question="\n{value} =",
    ),
    "ruler": Form(
        needle="One of the special magic {what}s for {key} is: {value}.",
        before=(
            "A special magic {what} is hidden within the following text. Make sure to memorize "
            "it. I will quiz you about the {what} afterwards.\n",
            "Some special magic {what}s are hidden within the following text. Make sure to "
            "memorize it. I will quiz you about the {what}s afterwards.\n",
        ),
        question=(
            "\nWhat is the special magic {what} for {keys} mentioned in the provided text? The "
            "special magic {what} for {keys} mentioned in the provided text is",
            "\nWhat are all the special magic {what}s for {keys} mentioned in the provided text? "
            "The special magic {what}s for {keys} mentioned in the provided text are",
        ),
        chain=("VAR {name} = {value}.", "VAR {name} = VAR {value}."),
        chain_before="Memorize and track the chain(s) of variable assignment hidden in the "
        "following text.\n\n",
        chain_question="\nQuestion: Find all variables that are assigned the value {value} in the "
        "text above. Answer: According to the chain(s) of variable assignment in the text above, "
        "{count} variables are assigned the value {value}, they are:",
    ),
}
