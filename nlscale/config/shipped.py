"""What comes with nlscale beside its code: the folders recipes/ and launch/, and recipes by name.

A clone has them at its top; a wheel carries copies in `nlscale/share` (setup.py puts them there).
A recipe's name is its path below recipes/ without the suffix: `quickstart`, `clusters/two-nodes`,
`sweeps/quickstart`. Where a verb asks for a cluster or a sweep, their folder may be left out.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_SHARE = _PACKAGE / "share"
SHIPPED = _SHARE if _SHARE.is_dir() else _PACKAGE.parent
"""Holds recipes/ and launch/."""
RECIPES = SHIPPED / "recipes"
_SUFFIX = ".yaml"


def names(folder: str = "recipes") -> list[str]:
    """The names of what lies in `recipes`, or `recipes/clusters` and such: in order, without it."""
    return sorted(path.name.removesuffix(_SUFFIX) for path in _files(SHIPPED / folder))


def everything() -> list[str]:
    """Every name, those of subfolders with them: recipes first."""
    folders = sorted(path.name for path in RECIPES.iterdir() if path.is_dir())
    return [*names(), *(f"{sub}/{name}" for sub in folders for name in names(f"recipes/{sub}"))]


def beside(path: Path, folder: str) -> list[str]:
    """The names in the folder below `folder` that a path names: those of tasks/ of `tasks/party`.

    Empty where there is no such folder.
    """
    inner = path.parent.name
    there = {each.name for each in (SHIPPED / folder).iterdir() if each.is_dir()}
    return names(f"{folder}/{inner}") if inner in there else []


def find(given: str | Path, folder: str = "recipes") -> Path:
    """The file that a person means: a path, or else the name of one that comes with nlscale.

    Args:
        given: path or name.
        folder: where names of its kind lie, `recipes` or below it.

    Returns:
        A file, or `given` as a path where there is none.
    """
    path = Path(given)
    if path.is_file():
        return path
    for place in (SHIPPED / folder, RECIPES):
        named = place / f"{given}{_SUFFIX}"
        if named.is_file() and named.resolve().is_relative_to(RECIPES):
            return named
    return path


def about(path: Path) -> str:
    """The first sentence of the comment that a recipe begins with."""
    comment = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or "." in comment:
            break
        comment += f"{line.removeprefix('#').strip()} "
    sentence, stop, _ = comment.strip().partition(". ")
    return sentence + "." * bool(stop) if sentence else ""


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"*{_SUFFIX}") if path.is_file()]
