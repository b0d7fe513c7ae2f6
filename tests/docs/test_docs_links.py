"""Links between the pages lead somewhere, on the documentation's site and on GitHub."""

from __future__ import annotations

import os
import re

import pytest
from docs.pages import PAGES, ROOT, text_of

LINKING = [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"]
REFERENCE = "docs/reference/"  # generated when the site is built, which checks links to it
API = "docs/api/"  # its anchors are, too


def without_code(text: str) -> str:
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "code", text)


def links(page: str) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", without_code(text_of(page)))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page: str) -> set[str]:
    """Of the headings of a page: those that are the same on the site and on GitHub."""
    text = re.sub(r"^ *```.*?^ *```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#{1,6} (.+?)\s*#*$", text, re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    kept = [re.sub(r"[^\w\s-]", "", heading).strip() for heading in plain]
    site = [re.sub(r"[-\s]+", "-", heading) for heading in kept]
    github = [heading.replace(" ", "-") for heading in kept]
    return {a for a, b in zip(site, github, strict=True) if a == b and site.count(a) == 1}


@pytest.mark.parametrize("page", LINKING)
def test_links_lead_to_a_file_and_to_a_heading_of_it(page: str) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        if page.startswith("docs/"):
            assert target.startswith("docs/"), f"{page}: {link} leaves what the site shows"
        if target.startswith(REFERENCE):
            continue
        assert (ROOT / target).exists(), f"{page}: {link} leads to nothing"
        if anchor and not target.startswith(API):
            assert anchor in anchors(target), f"{page}: {link}: {target} has no such heading"


def test_links_and_headings_are_found() -> None:
    assert sum(len(links(page)) for page in LINKING) > 20
    assert "levels" in anchors("README.md") or "levels" in anchors("docs/concepts/levels.md")
