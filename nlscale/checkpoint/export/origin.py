"""Where the weights came from that a run began with: what an export and its card say of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nlscale.checkpoint.export.files import CONFIG_FILE, read_json
from nlscale.errors import UserError

ORIGIN = "origin"
"""In config.json: `name` of the folder that was imported, its `architecture`, its `license`."""
_CARD = "README.md"
_CARD_BYTES = 1 << 16
_LICENSE = re.compile(r"^license:[ \t]*[\"']?([\w.+-]{1,60})[\"']?[ \t]*$", re.MULTILINE)
_LONGEST = 80


def imported_from(source: Path, described: dict[str, Any]) -> dict[str, str]:
    """What is to be remembered of a folder of Hugging Face.

    Args:
        source: the folder.
        described: its `config.json`.

    Returns:
        `name`, and where the folder states them `architecture` and `license`: of config.json, else
        of the head of its README.md, as it is written there.
    """
    classes = described.get("architectures")
    stated = {
        "name": source.absolute().name,
        "architecture": classes[0] if isinstance(classes, list) and classes else None,
        "license": described.get("license") or _stated_license(source / _CARD),
    }
    return {key: text for key, text in stated.items() if isinstance(text, str)}


def origin_of(weights: str | None) -> dict[str, str]:
    """The origin that an export states, of which a run has begun; {}: none, or it has gone.

    Args:
        weights: `run.weights` of the run.
    """
    if weights is None or not (Path(weights) / CONFIG_FILE).is_file():
        return {}
    try:
        found = read_json(Path(weights) / CONFIG_FILE).get(ORIGIN)
    except UserError:  # another folder may lie there by now, which is no reason not to export
        return {}
    found = found if isinstance(found, dict) else {}
    return {key: text for key, text in found.items() if isinstance(text, str)}


def beginning(weights: str | None, origin: dict[str, str]) -> str:
    """Sentences for a model card, with a space before them; "": the weights were drawn.

    Args:
        weights: `run.weights` of the run.
        origin: see `origin_of`.
    """
    if weights is None:
        return ""
    said = f" It began with the weights of the folder `{_plain(Path(weights).name)}`"
    if "name" not in origin:
        return f"{said}; the steps and tokens are those since."
    of = f", a `{_plain(origin['architecture'])}`" if "architecture" in origin else ""
    said += f", which were imported from `{_plain(origin['name'])}`{of}"
    license = f"`{_plain(origin['license'])}`" if "license" in origin else "none"
    return (
        f"{said}; the steps and tokens are those that nlscale has trained since. The licence that "
        f"the imported folder states: {license}."
    )


def _stated_license(card: Path) -> str | None:
    """The field of the YAML that a README.md may begin with."""
    if not card.is_file():
        return None
    with open(card, "rb") as file:
        text = file.read(_CARD_BYTES).decode(errors="replace")
    head = re.match(r"---\r?\n(.*?)^---", text, re.DOTALL | re.MULTILINE)
    found = _LICENSE.search(head[1].replace("\r", "")) if head else None
    return found[1] if found else None


def _plain(text: str) -> str:
    """Without what would be markup in a card: others have written it."""
    return re.sub(r"[^\w.+ -]", "?", text)[:_LONGEST]
