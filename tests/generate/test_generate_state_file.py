"""What the digest of a state file is made of: keys that came later, at their defaults, are not."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from nlscale.config import recipe
from nlscale.config.vocabulary import Config
from nlscale.generate.model import Model
from nlscale.generate.state_file import digest

LATER: dict[tuple[str, ...], tuple[str, ...]] = {
    ("model",): ("pattern",),
    ("model", "memory"): (
        "query_convolution", "write", "strength", "gain", "reads_state", "chunk_momentum",
        "gate_activation", "gates",
    ),
    ("model", "attention"): ("window",),
    ("levels",): ("phases",),
}  # fmt: skip
LATER_OF_A_LEVEL = ("memory", "update", "context", "copy_rate")


def config(*overrides: str) -> Config:
    return recipe.load(None, ["data.dir=none", *overrides], trusted=True).config


def digest_of(of: Config) -> str:
    """Of a model without weights."""
    bare = SimpleNamespace(config=of, step=6, _decoder=torch.nn.Module())
    return digest(cast(Model, bare))


def digest_before(of: Config) -> str:
    """As it was made when there were none of these keys: of all that there was."""
    sections: dict[str, Any] = {"model": asdict(of.model), "levels": asdict(of.levels)}
    for path, keys in LATER.items():
        section = sections
        for name in path:
            section = section[name]
        for key in keys:
            del section[key]
    for level in sections["levels"]["spectrum"]:
        for key in LATER_OF_A_LEVEL:
            del level[key]
    text = json.dumps(sections, sort_keys=True, default=str)
    return hashlib.sha256(f"{text}\n6\n".encode()).hexdigest()


@pytest.mark.parametrize(
    "given",
    [
        ["model.mixer=hope"],
        ["model.mixer=attention", "model.memory.chunk=8"],
        ["levels=[{wire: int8, optimizer: {rule: muon}}, {period: 4, outer: {every: 2}}]"],
        ["levels={spectrum: [1, 4], period_warmup: {steps: 20%}}"],
    ],
)
def test_a_file_of_before_a_key_is_one_of_its_default(given: list[str]) -> None:
    assert digest_of(config(*given)) == digest_before(config(*given))


@pytest.mark.parametrize(
    "other",
    [
        "model.memory.chunk=8",
        "model.memory.write=decayed",
        "model.memory.reads_state=true",
        "model.pattern=[hope,attention]",
        "model.pattern=[{mixer: hope, memory: {gain: kalman}},hope]",
        "levels=[{context: {chunk: 5}}]",
        "levels=[1,4]",
    ],
)
def test_any_key_that_is_set_makes_another_model(other: str) -> None:
    same = [config(other) for _ in range(2)]
    assert digest_of(same[0]) == digest_of(same[1]) != digest_of(config())


def test_keys_in_an_entry_of_a_pattern_tell_models_apart() -> None:
    pattern = "model.pattern=[{{mixer: hope, memory: {{{}}}}},attention]"
    digests = {
        digest_of(config(pattern.format(memory)))
        for memory in ("chunk: 8", "chunk: 16", "chunk: 8, write: decayed")
    }
    assert len(digests) == 3
