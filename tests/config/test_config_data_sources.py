"""Where tokens are from: one folder, or a mixture of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nlscale.config import recipe
from nlscale.config.data_sources import name_of
from nlscale.errors import UserError

RECIPE = """
data:
  mixture:
    - {dir: data/web, weight: 0.6}
    - {dir: data/code, weight: 0.3, epochs: 2}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mixed.yaml").write_text(RECIPE)
    return tmp_path / "mixed.yaml"


def test_a_mixture_is_read_overridden_and_written(file: Path, tmp_path: Path) -> None:
    loaded = recipe.load(file, ["data.mixture.1.weight=0.4", "data.mixture.0.name=pages"])
    data = loaded.config.data
    assert data.dir is None and data.folders() == ["data/web", "data/code"]
    assert [(name_of(s), s.weight, s.epochs) for s in data.mixture] == [
        ("pages", 0.6, None),
        ("code", 0.4, 2),
    ]
    assert "line 5" in recipe.explain(loaded, "data.mixture.1.epochs")
    recipe.write(loaded.config, tmp_path / "again.yaml")
    assert recipe.load(tmp_path / "again.yaml").config == loaded.config
    whole = recipe.load(None, ["data.mixture=[{dir: a}, {dir: b}]"]).config
    assert whole.data.folders() == ["a", "b"]
    assert recipe.load(file, ["data.mixture=[]", "data.dir=x"]).config.data.folders() == ["x"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.dir=x"], "data.mixture: there is a data.dir, too"),
        (["data.mixture=[]"], "data.dir is not set"),
        (["data.mixture.1.name=web"], "data.mixture.1.name: data.mixture.0 is called 'web', too"),
        (["data.mixture.1.dir=other/web"], "data.mixture.1.name: data.mixture.0 is called 'web'"),
        (["data.mixture.0.dir=."], "data.mixture.0.name: '' is no name"),
        (["data.mixture.0.name=a/b"], "data.mixture.0.name: 'a/b' is no name"),
        (["data.mixture.0.weight=null"], "data.mixture.0.weight: there is none"),
        (["data.mixture.0.weight=0"], "data.mixture.0.weight is 0.0; it must be above 0"),
        (["data.mixture.1.epochs=0"], "data.mixture.1.epochs is 0; it must be above 0"),
        (["data.mixture.1.epochs=1.5"], "data.mixture.1.epochs: 1.5 is not an integer"),
        (["data.temperature=0.5"], "data.temperature: it makes weights where none are given"),
        (["data.mixture=[{weight: 1}]"], "data.mixture.0.dir is not set"),
        (["data.mixture=web"], "data.mixture is 'web'; it must be a list of sources"),
        (["data.mixture=[web]"], "data.mixture.0 is 'web'; it must be a list of sources"),
        (["data.mixture.0.wieght=1"], "did you mean 'data.mixture.0.weight'?"),
    ],
)
def test_mistakes_name_the_key(file: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        recipe.load(file, overrides)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_mistakes_in_a_file_name_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace(", weight: 0.3", ""))
    with pytest.raises(UserError, match=rf"data.mixture.1.weight: .*\({path} line 5\)"):
        recipe.load(path)
