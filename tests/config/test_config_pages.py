"""Where to read more: every key has a page, and the page has what the table says it has."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest

from nlscale.config import recipe
from nlscale.config.pages import PAGES, page_of

ROOT = Path(__file__).parents[2]


def headings(page: Path) -> list[str]:
    """The anchors that mkdocs makes of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    plain = [unicodedata.normalize("NFKD", t).encode("ascii", "ignore").decode() for t in titles]
    return [re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", t).strip().lower()) for t in plain]


def test_every_key_has_a_page() -> None:
    for key in recipe.all_keys():
        assert page_of(key).startswith("docs/"), key
        assert page_of(key.replace(".N", ".3")) == page_of(key)


def test_the_table_names_keys_that_exist_and_no_page_twice_over() -> None:
    assert set(PAGES) <= set(recipe.all_keys())
    for key, page in PAGES.items():
        section = key.rpartition(".")[0]
        assert not section or page_of(section) != f"docs/{page}", f"{key} says what {section} says"


@pytest.mark.parametrize("entry", sorted(set(PAGES.values())))
def test_every_page_is_there_with_its_heading(entry: str) -> None:
    name, _, anchor = entry.partition("#")
    page = ROOT / "docs" / name
    assert page.is_file()
    assert not anchor or headings(page).count(anchor) == 1


def test_the_longest_beginning_counts_and_only_whole_names_of_it() -> None:
    assert page_of("model.memory.anchored") == "docs/concepts/memory.md#anchored-decay"
    assert page_of("model.norm_eps") == page_of("model")
    assert page_of("checkpoint.keep_every") != page_of("checkpoint")
    assert page_of("levels.spectrum.1.period").endswith("#periods-in-steps-or-tokens")


def test_explain_ends_with_where_to_read_more() -> None:
    loaded = recipe.load(None, ["data.dir=x"])
    assert recipe.explain(loaded, "model.memory.c").splitlines()[-1] == (
        "  read: docs/concepts/memory.md#the-delta-rule-and-c"
    )
