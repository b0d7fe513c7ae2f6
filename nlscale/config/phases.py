"""In which order the blocks of a stack take the phases of a level's period."""

from __future__ import annotations

from nlscale.config.choices import Phases


def order(depth: int, layers: int, phases: Phases) -> int:
    """The place of a block among the phases, 0 to `layers` - 1.

    Interleaved, the depth is written in digits whose bases are the prime factors of `layers`, and
    read backwards (van der Corput's order). Of each number of stages that is a product of the first
    of these factors, smallest first, the blocks of one stage then have every so-manyth place: an
    even share of each part of the period. Where stages are no such number it is nearly so.

    Args:
        depth: of the block, from 0.
        layers: blocks of the stack.
        phases: by depth, or interleaved.
    """
    if phases == Phases.by_depth:
        return depth
    place, weight, rest = 0, 1, layers
    for base in _factors(layers):
        rest //= base
        digit, depth = divmod(depth, rest)
        place += digit * weight
        weight *= base
    return place


def _factors(number: int) -> list[int]:
    """Its prime factors, smallest first."""
    found, factor = [], 2
    while factor * factor <= number:
        while number % factor == 0:
            found.append(factor)
            number //= factor
        factor += 1
    return [*found, number] if number > 1 else found
