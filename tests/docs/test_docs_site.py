"""The site of the documentation: it builds, its links lead somewhere, and it needs no network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from argparse import _SubParsersAction
from collections.abc import Iterator
from dataclasses import dataclass, field
from dataclasses import fields as fields_of
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from urllib.parse import unquote, urlsplit

import pytest

from nlscale.cli.command import _parser
from nlscale.cluster.machines import Cluster
from nlscale.config.keys import keys_of
from nlscale.config.recipe import all_keys
from nlscale.scaling.sweep.spec import _File

ROOT = Path(__file__).parents[2]
LOADS = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
"""What a page fetches by itself, unlike the links that a reader follows."""


@dataclass
class Page(HTMLParser):
    """What a page has to be linked to, and what it links to and loads."""

    path: Path
    ids: set[str] = field(default_factory=set)
    links: set[str] = field(default_factory=set)
    loads: set[str] = field(default_factory=set)
    equations: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        self.equations += tag == "math"
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        if tag in LOADS and LOADS[tag] in given:
            self.loads.add(given[LOADS[tag]])


def needs_mkdocs() -> None:
    for module in ("mkdocs", "material", "mkdocstrings_handlers", "math_core"):
        assert find_spec(module), f"{module} not found: pip install --editable '.[docs]'"


def build(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """MkDocs as docs/build.sh calls it, in that folder."""
    needs_mkdocs()
    environment = {**os.environ, "PYTHONPATH": str(folder), "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built from a copy of the tree as a fresh clone would have it."""
    folder = tmp_path_factory.mktemp("docs")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    done = build(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    """Those of the site but 404.html, which only a server shows, from any folder."""
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def is_external(link: str) -> bool:
    return bool(urlsplit(link).scheme or urlsplit(link).netloc)


def target(page: Page, link: str) -> tuple[Path, str]:
    """The file that a link of a page leads to, and the anchor in it."""
    parts = urlsplit(link)
    path = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
    return path, unquote(parts.fragment)


def test_every_link_leads_to_a_page_and_an_anchor(pages: dict[Path, Page]) -> None:
    assert len(pages) > 40
    broken = []
    for page in pages.values():
        for link in {link for link in page.links | page.loads if not is_external(link)}:
            path, anchor = target(page, link)
            known = pages[path].ids if path in pages else set()
            if not path.is_file() or (anchor and anchor not in known):
                broken.append(f"{page.path.name}: {link}")
    assert not broken


def test_pages_load_nothing_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert not {load for page in pages.values() for load in page.loads if is_external(load)}
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert styles and not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", "".join(styles))


def test_search_works_from_a_folder(site: Path, pages: dict[Path, Page]) -> None:
    """Browsers start no worker from a file, nor do they fetch an index there."""
    assert (site / "search" / "search_index.js").read_text().startswith("var __index = ")
    index = pages[site / "index.html"]
    assert "javascripts/iframe-worker.js" in index.loads


def test_every_key_has_an_anchor(site: Path, pages: dict[Path, Page]) -> None:
    known = pages[site / "reference" / "keys.html"].ids
    keys = [
        *all_keys(),
        *(f"cluster.{key}" for key in keys_of(Cluster)),
        *(f"sweep.{f.name}" for f in fields_of(_File)),
    ]
    assert "model.memory.c" in known and not set(keys) - known


def verbs(parser: object, name: str = "") -> Iterator[str]:
    for action in getattr(parser, "_actions", []):
        if isinstance(action, _SubParsersAction):
            for verb, inner in action.choices.items():
                full = f"{name}-{verb}".removeprefix("-")
                yield full
                yield from verbs(inner, full)


def test_every_command_has_an_anchor(site: Path, pages: dict[Path, Page]) -> None:
    known = pages[site / "reference" / "commands.html"].ids
    assert {"train", "checkpoint-list"} <= known and not set(verbs(_parser())) - known


def test_the_code_names_pages_that_there_are(site: Path, pages: dict[Path, Page]) -> None:
    missing = []
    for source in (ROOT / "nlscale").rglob("*.py"):
        for path, anchor in re.findall(
            r"docs/([\w-]+/[\w-]+)\.md(?:#([\w.-]+))?", source.read_text(encoding="utf-8")
        ):
            page = pages.get(site / f"{path}.html")
            if page is None or (anchor and anchor not in page.ids):
                missing.append(f"{source.name}: docs/{path}.md#{anchor}")
    assert not missing


def test_every_room_is_in_the_table_of_rooms() -> None:
    table = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (ROOT / "nlscale").glob("*/__init__.py")}
    assert not {room for room in rooms if f"`nlscale.{room}`" not in table}


def test_equations_are_drawn_without_a_script(site: Path, pages: dict[Path, Page]) -> None:
    assert pages[site / "concepts" / "levels.html"].equations > 10
    assert not [page for page in pages if 'class="arithmatex"' in page.read_text()]


SMALL = """
site_name: small
hooks: [{hooks}]
markdown_extensions: [{{pymdownx.arithmatex: {{generic: true}}}}]
"""


@pytest.mark.parametrize(
    ("equation", "right"),
    [
        (r"$\frac{1}{2}$", True),
        (r"$\fraq{1}{2}$", False),
        (r"$\frac{1}{2$", False),
        ("text $$x$$ text\n\n$$ y", False),
    ],
)
def test_a_mistake_in_an_equation_fails_the_build(
    tmp_path: Path, equation: str, right: bool
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# One\n\n{equation}\n")
    (tmp_path / "mkdocs.yml").write_text(SMALL.format(hooks=ROOT / "tools/docs/equations.py"))
    done = build(tmp_path)
    assert (done.returncode == 0) is right, done.stderr
    assert right or "index.md: not LaTeX" in done.stderr


STUB = """#!/usr/bin/env bash
echo "$*" >>calls
"""


@pytest.fixture
def empty_clone(tmp_path: Path) -> Path:
    """What installing reads, beside a Python that only notes what it is asked."""
    for name in ("pyproject.toml", "constraints.txt", "launch/install.sh", "docs/build.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB)
    python.chmod(0o755)
    return tmp_path


def calls(clone: Path, script: str, extras: str | None = None) -> list[str]:
    """What a script asks of Python, with those extras."""
    (clone / "calls").write_text("")
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("NLSCALE_EXTRAS", None)
    if extras is not None:
        environment["NLSCALE_EXTRAS"] = extras
    command = ["bash", "-euc", script]
    subprocess.run(command, cwd=clone, env=environment, check=True, capture_output=True)
    return (clone / "calls").read_text().splitlines()


def test_the_build_passes_shellcheck() -> None:
    assert which("shellcheck"), "shellcheck not found: apt-get install shellcheck"
    command = ["shellcheck", "--external-sources", "docs/build.sh"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_build_installs_what_it_needs_once_and_is_strict(empty_clone: Path) -> None:
    first = calls(empty_clone, "bash docs/build.sh --site-dir elsewhere")
    assert len(first) == 2 and first[0].startswith("-m pip install") and ".[docs]" in first[0]
    assert first[1] == "-m mkdocs build --strict --site-dir elsewhere"
    assert calls(empty_clone, "bash docs/build.sh") == ["-m mkdocs build --strict"]


def test_extras_that_are_installed_stay_so(empty_clone: Path) -> None:
    install = "source launch/install.sh"
    assert calls(empty_clone, install, "dev")
    assert calls(empty_clone, install, "docs")
    for extras in (None, "dev", "docs", "dev,docs"):
        assert not calls(empty_clone, install, extras)
    with (empty_clone / "pyproject.toml").open("a") as file:
        file.write("# another state\n")
    assert calls(empty_clone, install, "dev,docs")
    for extras in (None, "dev", "docs"):
        assert not calls(empty_clone, install, extras)
