"""The first three bAbI tasks (Weston et al., 2015), simulated; an id is a word.

    mary went kitchen . mary took apple . ? apple kitchen

People go to places, take what lies there, carry it along and drop it; after some facts comes a
question. Things lie somewhere from the start, which nobody is told.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from numpy.random import Generator

from nlscale.config.fields import within
from nlscale.data.tasks.task import Example, Ids, Task

_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_PEOPLE = ("daniel", "john", "mary", "sandra")
_THINGS = ("apple", "football", "milk")
_WORDS = (*_PLACES, *_PEOPLE, *_THINGS, "went", "took", "dropped", "before", "?", ".")
_ID = {word: number for number, word in enumerate(_WORDS)}


@dataclass
class World:
    """What a reader knows after some facts."""

    place_of: dict[str, str] = field(default_factory=dict)
    """Of people who have gone somewhere."""
    holder_of: dict[str, str] = field(default_factory=dict)
    """Of things that are carried."""
    places_of: dict[str, list[str]] = field(default_factory=dict)
    """Where each thing is known to have been, one after the other."""

    def tell(self, who: str, verb: str, what: str) -> None:
        """Take note of a fact."""
        if verb == "went":
            self.place_of[who] = what
            for thing in (t for t, holder in self.holder_of.items() if holder == who):
                if self.places_of[thing][-1] != what:
                    self.places_of[thing].append(what)
        elif verb == "took":
            self.holder_of[what] = who
            path = self.places_of.setdefault(what, [])
            if path[-1:] != [self.place_of[who]]:
                path.append(self.place_of[who])
        else:
            del self.holder_of[what]


@dataclass(frozen=True)
class _Babi(Task):
    """Facts of four words, questions of `_asks` words with their answers, which count."""

    family = "babi"
    _asks = 3
    """Words of a question with its answer."""

    facts: int = within(12, least=1, most=1 << 16)
    questions: int = within(3, least=1, most=1 << 16)
    """Spread over the facts alike; the last comes after the last fact."""

    def check(self) -> None:
        if self.facts < self._least * self.questions:
            raise self.wrong(
                f"{self.questions} questions need {self._least} facts each; set facts to "
                f"{self._least * self.questions} or more"
            )

    @property
    @abstractmethod
    def _least(self) -> int:
        """Facts before a question can be asked for the first time."""

    @abstractmethod
    def _known(self, world: World) -> list[list[str]]:
        """The questions that a reader can answer, each with its answer as the last word."""

    @property
    def length(self) -> int:
        return 4 * self.facts + self._asks * self.questions

    @property
    def words(self) -> Sequence[str]:
        return _WORDS

    @property
    def answers(self) -> range:
        return range(len(_PLACES))

    def draw(self, rng: Generator) -> Example:
        while (story := self._story(rng)) is None:  # nothing could be asked: another one
            pass
        return story

    def _story(self, rng: Generator) -> Example | None:
        world = World()
        lies = {thing: _pick(rng, _PLACES) for thing in _THINGS}
        ids: list[int] = []
        counted = []
        asked_after = {self.facts * (i + 1) // self.questions for i in range(self.questions)}
        for number in range(1, self.facts + 1):
            fact = _happens(rng, world, lies)
            world.tell(*fact)
            ids += [*(_ID[word] for word in fact), _ID["."]]
            if number not in asked_after:
                continue
            known = self._known(world)
            if not known:
                return None
            ids += [_ID[word] for word in known[int(rng.integers(len(known)))]]
            counted.append(len(ids) - 1)
        return self.padded(ids, counted)

    def solve(self, ids: Ids) -> int:
        said = [_WORDS[number] for number in ids.tolist()]
        world, at = World(), 0
        while at + self._asks - 1 < len(said):
            if said[at] == "?":
                at += self._asks
            else:
                world.tell(said[at], said[at + 1], said[at + 2])
                at += 4
        asked = said[at:]
        return next(_ID[q[-1]] for q in self._known(world) if q[:-1] == asked)

    def longer(self, factor: int) -> Task:
        """With as many times the facts and the questions."""
        return replace(self, facts=factor * self.facts, questions=factor * self.questions)


@dataclass(frozen=True)
class WhereIsSomeone(_Babi):
    """bAbI task 1: one fact answers."""

    name = "babi-1"
    about = "stories: where someone is"
    _least = 1

    def _known(self, world: World) -> list[list[str]]:
        return [["?", who, place] for who, place in sorted(world.place_of.items())]


@dataclass(frozen=True)
class WhereIsSomething(_Babi):
    """bAbI task 2: two facts answer, who has it and where they are."""

    name = "babi-2"
    about = "stories: where something is"
    _least = 2

    def _known(self, world: World) -> list[list[str]]:
        return [["?", what, places[-1]] for what, places in sorted(world.places_of.items())]


@dataclass(frozen=True)
class WhereWasSomething(_Babi):
    """bAbI task 3: three facts answer, where it was before it came, for the last time, to a place.

    A question is `? thing before place`.
    """

    name = "babi-3"
    about = "stories: where something was before it was somewhere"
    _asks = 5
    _least = 3

    def _known(self, world: World) -> list[list[str]]:
        known = []
        for what, places in sorted(world.places_of.items()):
            before = dict(zip(places[1:], places[:-1], strict=True))  # the last time counts
            known += [["?", what, "before", now, then] for now, then in before.items()]
        return known


def _happens(rng: Generator, world: World, lies: dict[str, str]) -> tuple[str, str, str]:
    """Something that can happen; `lies` is where things are that nobody carries."""
    handled = [
        *((who, "took", what) for what, place in lies.items()
          for who, at in world.place_of.items() if at == place),
        *((who, "dropped", what) for what, who in world.holder_of.items()),
    ]  # fmt: skip
    if handled and rng.integers(2):
        who, verb, what = handled[int(rng.integers(len(handled)))]
        if verb == "took":
            del lies[what]
        else:
            lies[what] = world.place_of[who]
        return who, verb, what
    who = _pick(rng, _PEOPLE)
    return who, "went", _pick(rng, [p for p in _PLACES if p != world.place_of.get(who)])


def _pick(rng: Generator, among: Sequence[str]) -> str:
    return among[int(rng.integers(len(among)))]
