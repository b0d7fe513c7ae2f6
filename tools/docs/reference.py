"""Pages of the reference, made from the code by MkDocs hooks; pages that docstrings name."""

from __future__ import annotations

import html
import logging
import re

import reference_commands
import reference_exits
import reference_fields
import reference_keys
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

_LOG = logging.getLogger("mkdocs.hooks.reference")
_PAGES = {
    "reference/keys.md": reference_keys.page,
    "reference/commands.md": reference_commands.page,
    "reference/metrics.md": reference_fields.metrics,
    "reference/summary.md": reference_fields.summary,
    "reference/plan-json.md": reference_fields.plan,
    "reference/eval-json.md": reference_fields.evaluations,
    "reference/exit-codes.md": reference_exits.page,
}
_NAMED = re.compile(r"docs/(?P<path>[\w-]+/[\w-]+\.md)(?P<anchor>#[\w.-]+)?")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the reference; called by MkDocs."""
    for path, page in _PAGES.items():
        files.append(File.generated(config, path, content=page()))
    return files


def on_page_content(content: str, page: Page, files: Files, **_: object) -> str:
    """Where a docstring names `docs/concepts/levels.md`, link that page; called by MkDocs."""

    def link(found: re.Match[str]) -> str:
        named = files.get_file_from_path(found["path"])
        if named is None:
            _LOG.warning("%s: a docstring names %s, which is no page", page.file.src_uri, found[0])
            return found[0]
        url = get_relative_url(named.url, page.url) + (found["anchor"] or "")
        return f'<a href="{html.escape(url)}">{found[0]}</a>'

    return _NAMED.sub(link, content) if page.file.src_uri.startswith("api/") else content
