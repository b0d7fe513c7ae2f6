"""What ranks must have been told alike, and what each node may have at a place of its own."""

from __future__ import annotations

import pytest

from nlscale.config import recipe
from nlscale.parallel.layout import _told


def test_folders_may_lie_elsewhere_on_each_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(at: str, weight: int = 1) -> object:
        begin = f"data.mixture=[{{dir: {at}/web, weight: 1}}]"
        later = f"[{{dir: {at}/web, weight: 1}}, {{dir: {at}/books, weight: {weight}}}]"
        stages = f"data.stages=[{{from: 50%, mixture: {later}}}]"
        return _told(recipe.load(None, [begin, stages]).config, {})

    assert told("/local/a") == told("/local/b")
    assert told("/local/a", weight=2) != told("/local/b")
