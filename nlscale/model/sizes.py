"""How large each part of the model is, and of which level, from the configuration alone.

The widths are chosen here, so that mixers compare at equal parameters: mixer and CMS of a block
together are as large as a Transformer block of the same width, 12 d_model^2 **[choice]**.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from nlscale.config.in_context import in_context
from nlscale.config.parts import depths_of, parts_of
from nlscale.config.vocabulary import CmsForm, Config, ContextObjective, Part
from nlscale.errors import UserError
from nlscale.model.pattern import block_kinds

Shape = tuple[int, int]
"""[out, in]."""

_BLOCK_BUDGET = 12  # a Transformer block: 4 d^2 of attention and 8 d^2 of feed-forward
CONTEXT_WINDOW = 4
"""Tokens of the convolution that makes targets of a level inside the context **[choice]**."""
_HIDDEN_MULTIPLE = 8  # hidden widths are rounded to this
_NUMBER = re.compile(r"^blocks\.(\d+)\.")


@dataclass(frozen=True)
class Place:
    """Parameters of the model that are of one level, in each block or once."""

    name: str
    """Of the parameters in the whole model: `*` at the place of a block's number is any, and at the
    end anything."""
    level: int
    depths: Sequence[int]
    """At which they are: of the blocks, or of the one that they count with."""
    parameters: int
    """At each depth, over all tensor-parallel ranks."""
    whole: int = 0
    """Those of them that every tensor-parallel rank holds all of."""
    matrices: dict[Shape, int] = field(default_factory=dict)
    """Of those in a block how many of each shape [out, in], for rules over whole matrices."""
    copied: int = 0
    """Of a level that holds copies, which are no parameters of the model: of how many at each
    depth, over all tensor-parallel ranks."""

    def holds(self, name: str) -> bool:
        """Whether a parameter is one of them, by its name in the whole model."""
        number = _NUMBER.match(name)
        if number is not None:
            if int(number[1]) not in self.depths:
                return False
            name = f"blocks.*.{name[number.end() :]}"
        return name.startswith(self.name[:-1]) if self.name.endswith("*") else name == self.name


def places(config: Config, vocabulary: int) -> list[Place]:
    """All parameters of the model, place by place; each is in exactly one.

    Args:
        config: the run.
        vocabulary: token ids of the model.
    """
    model, parts = config.model, parts_of(config)
    d, layers = model.d_model, model.layers
    blocks, independent = range(layers), model.cms == CmsForm.independent
    first, last = depths_of(Part.embedding, layers), depths_of(Part.head, layers)

    def norm(name: str, feeds: int, depths: range) -> Place:
        return Place(name, parts.norm_of(feeds), depths, d, whole=d)

    found = [Place("embedding.*", parts.embedding, first, vocabulary * d)]
    for i, (level, hidden) in enumerate(zip(parts.mlps, mlp_hidden(config), strict=True)):
        shapes = {(hidden, d): 2}
        shapes[d, hidden] = shapes.get((d, hidden), 0) + 1
        mlp, size = f"blocks.*.cms.mlps.{i}.*", 3 * d * hidden
        found.append(Place(mlp, level, blocks, size, matrices=shapes))
        if i == 0 or not independent:
            found.append(norm(f"blocks.*.cms.norms.{i}.*", level, blocks))
    if independent and (mlps := len(parts.mlps)) > 1:
        found.append(Place("blocks.*.cms.mixture", parts.mlps[0], blocks, mlps, whole=mlps))
    for level in parts.copies:
        found.append(Place("blocks.*.cms.copies", level, blocks, 0, copied=size))
    for each in in_context(config, ContextObjective.local):
        name, window = f"blocks.*.cms.contexts.{each.mlp}.*", CONTEXT_WINDOW * d
        found.append(Place(name, each.level, each.depths, d * d + window, window, {(d, d): 1}))
    found.append(norm("blocks.*.norm.*", parts.mixer, blocks))
    for kind in block_kinds(config):
        facts, own = kind.facts, kind.config.model
        # the facts of a mixer count the norm before it
        of_mixer, whole = facts.parameters(own) - d, facts.whole(own) - d
        found.append(
            Place(
                "blocks.*.mixer.*", parts.mixer, kind.depths, of_mixer, whole, facts.matrices(own)
            )
        )
    found.append(norm("norm.*", parts.head, last))
    if not model.tie_embeddings:
        found.append(Place("head.*", parts.head, last, vocabulary * d))
    return found


def mlp_hidden(config: Config) -> list[int]:
    """Hidden units of each MLP in a block, in their order: of the levels that have one.

    Raises:
        UserError: see `level_hidden`.
    """
    return [hidden for hidden in level_hidden(config) if hidden]


def level_hidden(config: Config) -> list[int]:
    """Hidden units of each level's MLP in a block, fastest level first; 0 where it has none.

    Raises:
        UserError: the mixer leaves no room, or given widths exceed the total.
    """
    model, mlps = config.model, parts_of(config).mlps
    given = [config.levels.spectrum[level].hidden for level in mlps]
    chosen = sum(h for h in given if h is not None)
    open_levels = given.count(None)
    total = model.hidden
    if open_levels == 0 and total not in (None, chosen):
        raise UserError(
            f"model.hidden {total} is not the sum of the levels' own, {chosen}; leave it null"
        )
    if total is None:
        kinds = block_kinds(config)
        of_mixers = sum(len(k.depths) * k.facts.parameters(k.config.model) for k in kinds)
        # all blocks have the same widths: those of which the whole model comes out as large
        left = _BLOCK_BUDGET * model.d_model**2 - of_mixers / model.layers
        total = round(left / (3 * model.d_model))
    # in units of the multiple, the first levels take one more where it does not come out even
    units, more = divmod(round((total - chosen) / _HIDDEN_MULTIPLE), max(1, open_levels))
    if open_levels and units < 1:
        raise UserError(
            f"model.hidden: {total} units leave {max(0, total - chosen)} for the levels without a "
            f"width of their own, {open_levels} in number; use fewer levels, a larger d_model or "
            f"set model.hidden"
        )
    widths = iter([(units + (i < more)) * _HIDDEN_MULTIPLE for i in range(open_levels)])
    of_level = {
        level: next(widths) if h is None else h for level, h in zip(mlps, given, strict=True)
    }
    return [of_level.get(level, 0) for level in range(len(config.levels.spectrum))]


def level_parameters(config: Config, vocabulary: int) -> list[int]:
    """Parameters of each level over the whole model, fastest first."""
    counts = [0] * len(config.levels.spectrum)
    for place in places(config, vocabulary):
        counts[place.level] += place.parameters * len(place.depths)
    return counts


def level_matrices(config: Config) -> list[list[dict[Shape, int]]]:
    """How many matrices of each shape [out, in] there are, [level][depth], fastest level first.

    What rules over whole matrices take (`nlscale.optim.table`); neither embedding nor head.
    """
    found: list[list[dict[Shape, int]]] = [
        [{} for _ in range(config.model.layers)] for _ in config.levels.spectrum
    ]
    for place in places(config, vocabulary=0):
        for depth in place.depths if place.matrices else ():
            shapes = found[place.level][depth]
            for shape, number in place.matrices.items():
                shapes[shape] = shapes.get(shape, 0) + number
    return found


def block_parameters(config: Config) -> list[float]:
    """Parameters of each block, over all tensor-parallel ranks, and of the last norm their share:
    what a block weighs beside others."""
    layers = config.model.layers
    found = [0.0] * layers
    for place in places(config, vocabulary=0):
        for depth in place.depths:
            found[depth] += place.parameters
    found[-1] -= config.model.d_model
    return [count + config.model.d_model / layers for count in found]


def tables(config: Config) -> int:
    """Matrices of vocabulary x d_model: the embedding and the head, or one that is both."""
    return 1 if config.model.tie_embeddings else 2


def state_bytes(config: Config) -> int | None:
    """What the mixers of all blocks carry of one sequence of `data.sequence_length` tokens; None
    where one of them does not say."""
    found = 0
    for kind in block_kinds(config):
        each = kind.facts.state_bytes(kind.config)
        if each is None:
            return None
        found += len(kind.depths) * each
    return found


def non_embedding_parameters(config: Config, vocabulary: int) -> int:
    """Parameters of the model without those of the embedding, which is looked up, not computed.

    The head counts: every token pays for its product, also where it is the embedding. Kaplan et al.
    2020 leave it out too, being the embedding once more, which bends laws of small models (Porian
    et al. 2024; Pearce & Song 2024).
    """
    looked_up = (tables(config) - 1) * vocabulary * config.model.d_model
    return sum(level_parameters(config, vocabulary)) - looked_up
