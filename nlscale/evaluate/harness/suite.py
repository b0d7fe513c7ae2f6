"""Tasks that are asked for by one name, and which of their metrics then count. No torch."""

from __future__ import annotations

from typing import NamedTuple


class Listed(NamedTuple):
    """A task of lm-evaluation-harness in a suite."""

    task: str
    folder: str
    """Of the harness's tasks that it is in: reading that one alone takes no time, all of them
    8 seconds and more."""
    metrics: tuple[str, ...]
    """That are shown."""


SUITES: dict[str, tuple[Listed, ...]] = {
    "paper": (
        Listed("wikitext", "wikitext", ("word_perplexity",)),
        Listed("lambada_openai", "lambada", ("perplexity", "acc")),
        Listed("piqa", "piqa", ("acc",)),
        Listed("hellaswag", "hellaswag", ("acc_norm",)),
        Listed("winogrande", "winogrande", ("acc",)),
        Listed("arc_easy", "arc", ("acc",)),
        Listed("arc_challenge", "arc", ("acc_norm",)),
        Listed("social_iqa", "siqa", ("acc",)),
        Listed("boolq", "super_glue/boolq", ("acc",)),
    ),
}
"""`paper`: what Hope and the models beside it are held against in the paper on Nested Learning."""
FOLDERS = {listed.task: listed.folder for suite in SUITES.values() for listed in suite}
