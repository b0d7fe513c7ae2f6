"""Equations as MathML, made while the site is built: browsers draw it without a script or a font.

`pymdownx.arithmatex` marks what stands between dollars; here each of it is converted. What is not
LaTeX is a warning, which a strict build does not let pass.
"""

from __future__ import annotations

import html
import logging
import re

from math_core import LatexError, LatexToMathML
from mkdocs.structure.pages import Page

_LOG = logging.getLogger("mkdocs.hooks.equations")
_MARKED = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*\\[(\[](?P<latex>.*?)\\[)\]]\s*</(?P=tag)>',
    re.DOTALL,
)
_CONVERTER = LatexToMathML(fancy_error=False)


def on_page_content(content: str, page: Page, **_: object) -> str:
    """Convert the equations of a page; called by MkDocs."""
    content, mistakes = _to_mathml(content)
    for mistake in [*mistakes, *_unmarked(content)]:
        _LOG.warning("%s: not LaTeX: %s", page.file.src_uri, mistake)
    return content


def _to_mathml(page: str) -> tuple[str, list[str]]:
    """A page's HTML with its equations converted, and what is wrong with those that cannot be."""
    mistakes: list[str] = []

    def convert(found: re.Match[str]) -> str:
        latex = html.unescape(found["latex"]).strip()
        try:
            return _in_its_box(found["tag"], latex)
        except LatexError as error:
            mistakes.append(f"{latex}: {' '.join(str(error).split())}")
            return found[0]

    return _MARKED.sub(convert, page), mistakes


def _unmarked(page: str) -> list[str]:
    """Double dollars that are left: equations that do not stand alone between empty lines."""
    prose = re.sub(r"<(pre|code)\b.*?</\1>", "", page, flags=re.DOTALL)
    return re.findall(r"\$\$.{0,40}", prose)


def _in_its_box(tag: str, latex: str) -> str:
    drawn = _CONVERTER.convert_with_local_state(latex, displaystyle=tag == "div")
    return f'<div class="equation">{drawn}</div>' if tag == "div" else drawn
