"""`nlscale recipe`: what comes with nlscale, listed, shown and copied."""

from __future__ import annotations

from pathlib import Path

import pytest

from nlscale import cli
from nlscale.config import recipe, shipped


def nlscale(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_it_lists_every_file_with_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert nlscale("recipe", "list") == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {words[0]: " ".join(words[1:]) for words in map(str.split, lines) if words}
    for name in shipped.everything():
        assert listed[name] == shipped.about(shipped.find(name))


def test_it_shows_one_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert nlscale("recipe", "show", "clusters/test") == 0
    assert capsys.readouterr().out == (shipped.RECIPES / "clusters/test.yaml").read_text()


def test_a_copy_can_be_changed_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert nlscale("recipe", "copy", "quickstart") == 0
    assert nlscale("recipe", "copy", "clusters/test", "mine.yaml") == 0
    mine = Path("quickstart.yaml")
    mine.write_text(mine.read_text().replace("steps: 400", "steps: 7"))
    assert recipe.load("quickstart.yaml").config.train.steps == 7
    assert nlscale("plan", "quickstart.yaml", "--cluster", "mine.yaml", "model.vocabulary=8") == 0
    assert "7 steps" in capsys.readouterr().out


def test_nothing_is_overwritten_and_mistakes_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart.yaml").write_text("mine")
    assert nlscale("recipe", "copy", "quickstart") == 2
    assert "quickstart.yaml exists; remove it or name another file" in capsys.readouterr().err
    assert Path("quickstart.yaml").read_text() == "mine"
    assert nlscale("recipe", "copy", "quickstart", "no/such/folder.yaml") == 2
    assert "cannot write no/such/folder.yaml: No such file" in capsys.readouterr().err
    for name in ("two-nodes", "../setup", "/etc/passwd"):
        assert nlscale("recipe", "show", name) == 2
        assert f"is called {name!r}; " in capsys.readouterr().err
