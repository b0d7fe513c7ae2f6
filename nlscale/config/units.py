"""Values that carry their unit, as a recipe writes them: ``16 steps``, ``8M tokens``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Literal

from nlscale.config.vocabulary import LevelConfig
from nlscale.errors import UserError

_MULTIPLIERS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
_NUMBER = r"(0|[1-9][0-9]*)(?:\.[0-9]+)?"
_LONGEST = 10**18
_PERIOD = re.compile(
    rf"\s*(?P<number>{_NUMBER})\s*(?P<multiplier>[kMGBT]?)\s*(?P<unit>steps?|tokens?)?\s*"
)
_BYTES = re.compile(rf"\s*(?P<number>{_NUMBER})\s*(?P<prefix>[kKMGTP]?)(?P<binary>i?)B\s*")
_MOST_BYTES = 10**18
_START = re.compile(
    rf"\s*(?P<number>{_NUMBER})\s*(?P<multiplier>[kMGBT]?)\s*(?P<unit>steps?|%)?\s*"
)
_MINUTES = re.compile(rf"\s*(?P<number>{_NUMBER})\s*minutes?\s*")


@dataclass(frozen=True)
class Period:
    """How often a level updates: a number of optimizer steps or of tokens.

    In tokens a period does not change when the global batch does (docs/concepts/levels.md); in
    steps it does not change when the data do.
    """

    count: int
    unit: Literal["steps", "tokens"]

    @classmethod
    def parse(cls, text: str | int) -> Period:
        """Read ``16``, ``"16 steps"`` or ``"8M tokens"``; a bare number is steps.

        Raises:
            UserError: not of that form, not whole, or not at least 1.
        """
        match = _PERIOD.fullmatch(str(text))
        if match is None:
            raise UserError(
                f"period {text!r} is not a duration; write for example '16 steps' or '8M tokens'"
            )
        number, multiplier, unit = match.group("number", "multiplier", "unit")
        count = Decimal(number) * _MULTIPLIERS[multiplier]
        if count < 1:
            raise UserError(f"period {text!r} is less than 1; the fastest level has '1 step'")
        if count > _LONGEST:
            raise UserError(f"period {text!r} is longer than any run; give at most 10^18")
        if count != int(count):
            raise UserError(f"period {text!r} is not a whole number of steps or tokens")
        return cls(int(count), "tokens" if (unit or "").startswith("token") else "steps")

    def in_steps(self, tokens_per_step: int) -> int:
        """The period in optimizer steps, at least 1, for a global batch of that many tokens."""
        if self.unit == "steps":
            return self.count
        return max(1, round(self.count / tokens_per_step))

    def __str__(self) -> str:
        unit = self.unit[:-1] if self.count == 1 else self.unit
        return f"{human_count(self.count) if self.unit == 'tokens' else self.count} {unit}"


@dataclass(frozen=True)
class Start:
    """When something begins in a run: after a number of steps, or a share of them."""

    count: Decimal
    unit: Literal["steps", "%"]

    @classmethod
    def parse(cls, text: str) -> Start:
        """Read ``"1000 steps"`` or ``"25%"``; a bare number is steps.

        Raises:
            UserError: not of that form, more than 100%, or no whole number of steps.
        """
        match = _START.fullmatch(text)
        if match is None or (match["unit"] == "%" and match["multiplier"]):
            raise UserError(f"{text!r} is not a place in a run; write '25%' or '1000 steps'")
        count = Decimal(match["number"]) * _MULTIPLIERS[match["multiplier"]]
        if match["unit"] == "%":
            if count > 100:
                raise UserError(f"{text!r} is after the end of the run; write at most 100%")
            return cls(count, "%")
        if count != int(count) or count > _LONGEST:
            raise UserError(f"{text!r} is no whole number of steps of at most 10^18")
        return cls(count, "steps")

    def in_steps(self, steps: int) -> int:
        """Steps of a run of that many that come before it: the nearest number to a share."""
        if self.unit == "steps":
            return int(self.count)
        return int((self.count * steps / 100).to_integral_value(ROUND_HALF_UP))


@dataclass(frozen=True)
class Interval:
    """How often something is done in a run: every so many steps, tokens or minutes."""

    count: float
    unit: Literal["steps", "tokens", "minutes"]

    @classmethod
    def parse(cls, text: str) -> Interval:
        """Read ``"500 steps"``, ``"2B tokens"`` or ``"30 minutes"``.

        Raises:
            UserError: not of that form, or not above 0.
        """
        minutes = _MINUTES.fullmatch(text)
        if minutes and 0 < float(minutes["number"]) < math.inf:
            return cls(float(minutes["number"]), "minutes")
        try:
            period = Period.parse(text)
        except UserError:
            raise UserError(
                f"{text!r} is not an interval; write '500 steps', '2B tokens' or '30 minutes'"
            ) from None
        return cls(period.count, period.unit)


def declared_period(index: int, entry: LevelConfig) -> Period:
    """The period of a level as the recipe has it.

    Raises:
        UserError: it is not a period; the key is named.
    """
    try:
        return Period.parse(entry.period)
    except UserError as error:
        raise UserError(f"levels.spectrum.{index}.{error}") from None


def read_bytes(text: str) -> int:
    """Bytes of a text such as ``200 GB`` or ``1.5 TiB``, decimal or binary.

    Raises:
        ValueError: not of that form, or below one byte; what to write.
    """
    match = _BYTES.fullmatch(text)
    if match is None:
        raise ValueError(f"is {text!r}, which is no size; write for example '200 GB'")
    factor = 1024 if match["binary"] else 1000
    power = " kMGTP".index({"": " ", "K": "k"}.get(match["prefix"], match["prefix"]))
    size = int(Decimal(match["number"]) * factor**power)
    if not 1 <= size <= _MOST_BYTES:
        raise ValueError(f"is {text!r}; it must be at least 1 B and at most 10^18")
    return size


def human_count(count: float) -> str:
    """A count in three figures and a unit: 950, 21.3k, 557k, 13.1M, 2.5B, 1T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,950 reads "1M", not "1000k": the unit is chosen after rounding.
        if abs(count) >= size * 0.9995:
            return f"{float(f'{count / size:.3g}'):g}{unit}"
    return f"{count:.3g}"


def human_bytes(number: float) -> str:
    """Bytes with a decimal prefix, as network and disk vendors count: ``1.3 GB``."""
    for limit, suffix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(number) >= limit:
            return f"{number / limit:.3g} {suffix}"
    return f"{number:.0f} B"
