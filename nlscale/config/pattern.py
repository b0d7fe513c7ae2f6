"""`model.pattern`: the mixers of different blocks, as recipes write them and messages show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nlscale.config import trees
from nlscale.config.keys import to_plain
from nlscale.config.presets import MIXER_PRESETS
from nlscale.config.vocabulary import MemoryConfig


def expand(tree: dict[str, Any], sources: dict[str, str]) -> None:
    """`model.pattern: [hope, attention]` is short for [{mixer: hope}, {mixer: attention}], and null
    for no entries."""
    model = tree.get("model")
    if isinstance(model, dict) and model.get("pattern", []) is None:
        model["pattern"] = []
    entries = _entries(tree)
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict | list) and entry is not None:
            entries[i] = {"mixer": entry}
            key = f"model.pattern.{i}"
            sources[f"{key}.mixer"] = sources.get(key, "")


def hand_memory_down(tree: dict[str, Any], sources: dict[str, str]) -> None:
    """What `model.memory` sets holds in every entry of a pattern that does not set it itself."""
    entries = _entries(tree)
    shared = tree["model"].get("memory") if entries else None
    if not isinstance(shared, dict):
        return
    for i, entry in enumerate(entries):
        own = entry.setdefault("memory", {}) if isinstance(entry, dict) else None
        if not isinstance(own, dict):
            continue  # refused with all that has another shape than it should
        for name, value in shared.items():
            if value is not None and own.get(name) is None:
                own[name] = value
                key = f"model.memory.{name}"
                sources[f"model.pattern.{i}.memory.{name}"] = sources.get(key, key)


def shortened(model: Mapping[str, Any]) -> list[Any]:
    """The pattern of a plain `model` section as a person writes it: names, and memories only where
    they are not what the name says."""
    short: list[Any] = []
    for entry in model.get("pattern", []):
        usual = to_plain(MemoryConfig()) | MIXER_PRESETS.get(entry["mixer"], {})
        own = {key: x for key, x in entry["memory"].items() if x != usual.get(key)}
        short.append({"mixer": entry["mixer"], "memory": own} if own else entry["mixer"])
    return short


def text_of(model: Mapping[str, Any]) -> str:
    """The same as a text, which `model.pattern=...` reads."""
    entries = (x if isinstance(x, str) else trees.dump(x) for x in shortened(model))
    return f"[{', '.join(entries)}]"


def _entries(tree: dict[str, Any]) -> list[Any]:
    """Those of model.pattern, where it is a list."""
    model = tree.get("model")
    entries = model.get("pattern") if isinstance(model, dict) else None
    return entries if isinstance(entries, list) else []
