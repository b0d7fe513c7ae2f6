"""Which level each part of the model belongs to (docs/concepts/levels.md). No tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from nlscale.config.schema import where
from nlscale.config.vocabulary import (
    CmsForm,
    Config,
    LevelConfig,
    LevelsConfig,
    ModelConfig,
    Part,
)
from nlscale.errors import UserError


@dataclass(frozen=True)
class Parts:
    """The level of each part, an index into the spectrum."""

    mlps: tuple[int, ...]
    """Of the MLPs of a block in their order: the levels that have one."""
    mixer: int
    embedding: int
    head: int
    norms: int | None
    """None: each norm is of the level of what it feeds."""
    copies: tuple[int, ...] = ()
    """Levels that hold copies of the one MLP of a block (`model.cms: nested`), fastest first."""

    def norm_of(self, level: int) -> int:
        """The level of a norm, from that of what it feeds."""
        return level if self.norms is None else self.norms

    def of_level(self, level: int) -> list[Part]:
        """The parts of a level."""
        once = {part: getattr(self, part.value) for part in Part if part != Part.cms}
        cms = level in self.mlps + self.copies
        return [p for p in Part if (cms if p == Part.cms else once[p] == level)]

    def depths(self, level: int, layers: int) -> list[int]:
        """The depths at which a level has parameters."""
        return sorted({d for part in self.of_level(level) for d in depths_of(part, layers)})


def depths_of(part: Part, layers: int) -> range:
    """Where a part lies: the embedding with the first block, the head with the last."""
    once = {Part.embedding: range(1), Part.head: range(layers - 1, layers)}
    return once.get(part, range(layers))


def parts_of(config: Config, sources: Mapping[str, str] | None = None) -> Parts:
    """The parts of a configuration's levels.

    Args:
        config: of the run.
        sources: where its keys were read, for messages.

    Raises:
        UserError: a part that two levels have, or none could; a level that has nothing; a width of
            an MLP that is not there; a tied head apart from the embedding.
    """
    spectrum = config.levels.spectrum
    mlps: list[int] = []
    found: dict[Part, int] = {}

    def refuse(index: int, key: str, message: str) -> NoReturn:
        key = f"levels.spectrum.{index}.{key}"
        raise UserError(f"{key}{message}{where(key, sources or {})}")

    for index, entry in enumerate(spectrum):
        given = [Part.cms] if entry.parts is None else entry.parts
        for part in given:
            if given.count(part) > 1:
                refuse(index, "parts", f" names {part.value} twice; name it once")
            if part == Part.cms:
                mlps.append(index)
            elif part in found:
                other = found[part]
                refuse(
                    index,
                    "parts",
                    f": {part.value} is of level {spectrum[other].name!r} already "
                    f"(levels.spectrum.{other}.parts); name it at one of them",
                )
            else:
                found[part] = index
        if entry.hidden is not None and index not in mlps:
            refuse(
                index,
                "hidden",
                f" is {entry.hidden}, and the level has no MLP: its parts leave out cms; name it "
                f"there, or leave hidden out",
            )
    if spectrum and not mlps:
        refuse(
            len(spectrum) - 1,
            "parts",
            " leaves out cms, and so do the parts of all levels; one at least has an MLP",
        )
    embedding = found.get(Part.embedding, 0)
    tied = config.model.tie_embeddings
    head = found.get(Part.head, embedding if tied else 0)
    if tied and head != embedding:
        refuse(
            head,
            "parts",
            f" names head, and with model.tie_embeddings that is the embedding, which is of level "
            f"{spectrum[embedding].name!r}; name embedding alone, or both at one level",
        )
    first = 1 if config.model.cms == CmsForm.nested else len(mlps)
    parts = Parts(
        mlps=tuple(mlps[:first]),
        mixer=found.get(Part.mixer, 0),
        embedding=embedding,
        head=head,
        norms=found.get(Part.norms),
        copies=tuple(mlps[first:]),
    )
    for index, entry in enumerate(spectrum):
        if not parts.of_level(index):
            refuse(
                index,
                "parts",
                f" leaves level {entry.name!r} nothing of the model; name a part there, or take "
                f"the level out",
            )
    return parts


def parts_of_saved(config: Mapping[str, Any]) -> Parts:
    """The parts of a configuration that was saved as plain dicts, where `parts` may be lacking."""
    spectrum = [
        LevelConfig(
            name=level["name"], parts=(given := level.get("parts")) and [Part(p) for p in given]
        )
        for level in config["levels"]["spectrum"]
    ]
    saved = config["model"]
    model = ModelConfig(
        cms=CmsForm(saved.get("cms", "sequential")),
        tie_embeddings=saved.get("tie_embeddings", False),
    )
    return parts_of(Config(model=model, levels=LevelsConfig(spectrum)))
