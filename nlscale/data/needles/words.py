"""Keys and values of needles. Keys of two words are many: the product of these.

All words have five letters, so that in bytes a question of a kind always takes the same room.
"""

from __future__ import annotations

from uuid import UUID

from numpy.random import Generator

_ADJECTIVES = (
    "agile alert amber ample basic blank blind blunt brave brief brisk broad brown bumpy burly "
    "cheap chief clean clear close crisp cruel curly daily dense dirty dizzy dusty eager early "
    "eerie empty equal exact faint false fancy fiery final first fixed fluid frail fresh funny "
    "fuzzy giant giddy grand great green gross grown handy happy harsh hasty heavy human humid "
    "ideal inner ivory jolly juicy known large legal level light local loose loyal lucid lucky "
    "lunar magic major merry minor misty moist muddy naive noble noisy outer perky plain plump "
    "polar prime proud quick quiet rapid ready regal rigid rival rough round royal rusty salty "
    "sandy sharp shiny short silly sleek slick small smart snowy sober solar solid sound spare "
    "spicy stale steep stern stiff still stout sunny sweet swift tasty tense thick tight tired "
    "tough vague valid vital vivid weary whole windy young zesty"
)
_NOUNS = (
    "acorn alarm album angle ankle apple apron arrow atlas attic award bacon badge bagel baker "
    "basin beach beard bench berry bison blade board bread brick bride broom brush cabin cable "
    "camel canal candy canoe cargo chain chair chalk chart cheek chess chest cliff cloak clock "
    "cloud clown coach coast comet coral couch crane cream creek crown curve daisy dance diary "
    "drain dress drill eagle earth easel elbow fairy fence ferry field flame flask fleet flute "
    "forge frame fruit ghost glass globe glove grape grass guard guide heart hedge hinge honey "
    "horse hotel house igloo jelly jewel judge juice kiosk knife label ladle lemon lever linen "
    "llama lunch mango maple march medal melon metal meter money motor mouse movie music nurse "
    "ocean olive onion opera orbit organ otter owner paint panda paper patch pearl pedal phone "
    "photo piano pilot pizza plane plant plate plaza porch pouch prism quilt radio ranch razor "
    "river robin robot ruler salad sauce scale scarf scout shark sheep shelf shell shirt skirt "
    "slate sleet smile snail snake spade spear spice spoon stage stamp steam stone stool storm "
    "stove straw sugar table tiger toast topaz torch tower track trail train truck trunk tulip "
    "valve vault verse villa viola wagon waist watch water whale wheat wheel whisk witch yacht "
    "zebra"
)
_FIRST, _SECOND = _ADJECTIVES.split(), _NOUNS.split()
DIGITS = 7
"""Of a number."""


def keys(rng: Generator, count: int) -> list[str]:
    """`count` keys of two words, at most some thousands, each once."""
    numbers = rng.choice(len(_FIRST) * len(_SECOND), count, replace=False)
    return [f"{_FIRST[n // len(_SECOND)]}-{_SECOND[n % len(_SECOND)]}" for n in numbers.tolist()]


def uuids(rng: Generator, count: int) -> list[str]:
    """`count` random UUIDs of version 4."""
    return [str(UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]


def numbers(rng: Generator, count: int, digits: int = DIGITS) -> list[str]:
    """`count` numbers of so many digits, the first no zero."""
    first = 10 ** (digits - 1)
    return [str(number) for number in rng.integers(first, 10 * first, count).tolist()]


def variables(rng: Generator, count: int) -> list[str]:
    """`count` names of five capitals."""
    return ["".join(map(chr, 65 + rng.integers(0, 26, 5))) for _ in range(count)]
