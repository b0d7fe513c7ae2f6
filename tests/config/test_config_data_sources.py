"""Where tokens are from: one folder, or a mixture of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nlscale.config import recipe
from nlscale.config.curriculum import curriculum, mixture_starts, of_plain
from nlscale.config.data_sources import folders_of, mixtures_of, name_of
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


def stage(mixture: str, start: str = "50%") -> str:
    return f"data.stages=[{{from: {start}, mixture: {mixture}}}]"


def test_stages_mix_other_sources(file: Path, tmp_path: Path) -> None:
    annealed = stage("[{dir: data/math, weight: 3}, {dir: data/web, weight: 1}]")
    loaded = recipe.load(file, [annealed, "data.stages.0.mixture.1.epochs=2"])
    config = loaded.config
    assert config.data.folders() == ["data/web", "data/code", "data/math"]
    assert list(mixtures_of(config.data)) == ["data.mixture", "data.stages.0.mixture"]
    assert config.data.stages[0].mixture[1].epochs == 2
    assert mixture_starts(config) == [0, config.train.steps // 2]
    assert len(curriculum(config)) == 1  # all of its steps cost the same
    recipe.write(config, tmp_path / "again.yaml")
    assert recipe.load(tmp_path / "again.yaml").config == config
    assert of_plain(recipe.to_plain(config)) == curriculum(config)
    alone = recipe.load(None, ["data.dir=data/web", annealed]).config.data
    assert [[name_of(s) for s in mixture] for mixture in mixtures_of(alone).values()] == [
        ["web"],
        ["math", "web"],
    ]
    assert mixtures_of(recipe.load(None, ["data.dir=data/web"]).config.data) == {}
    whole = [stage("[{dir: a}, {dir: b}]"), "data.temperature=0.5"]
    assert recipe.load(file, whole).config.data.temperature == 0.5


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([stage("[]")], "data.stages.0 changes nothing; give its sequence_length or a mixture"),
        ([stage("[{dir: x}]", "0%")], "data.stages.0.from: it begins with the run"),
        ([stage("[{dir: x/web}]")], "data.stages.0.mixture.0.name: data.mixture.0 is called 'web'"),
        (
            [stage("[{dir: data/web, name: x}]")],
            "data.stages.0.mixture.0.name: data.mixture.0 is data/web, too, and is called 'web'",
        ),
        (
            ["data.mixture=[]", "data.dir=data/web", stage("[{dir: x/web}]")],
            "data.stages.0.mixture.0.name: data.dir is called 'web', too, and is data/web",
        ),
        ([stage("[{dir: x}, {dir: x}]")], "data.stages.0.mixture.0 is called 'x', too"),
        (
            [stage("[{dir: x, weight: 1}, {dir: y}]")],
            "data.stages.0.mixture.1.weight: there is none, and data.stages.0.mixture.0 has one",
        ),
        (
            [stage("[{dir: x, weight: 1}]"), "data.temperature=0"],
            "data.temperature: it makes weights where none are given, and the sources have weights",
        ),
        ([stage("[x]")], "data.stages.0.mixture.0 is 'x'; it must be a list of sources"),
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


@pytest.mark.parametrize(
    "given",
    [
        ["data.dir=a"],
        ["data.mixture=[{dir: a, weight: 1}, {dir: b, weight: 1}]"],
        ["data.dir=a", "data.stages=[{from: 50%, mixture: [{dir: b, weight: 1}]}]"],
        ["data.dir=a", "data.stages=[{from: 50%, mixture: [{dir: a, weight: 1}]}]"],
        ["data.dir=a", "data.stages=[{from: 50%, sequence_length: 8}]"],
    ],
)
def test_a_saved_section_names_the_folders_of_the_run(given: list[str]) -> None:
    config = recipe.load(None, given).config
    assert folders_of(recipe.to_plain(config)["data"]) == config.data.folders()


@pytest.mark.parametrize("saved", [None, 7, {}, {"mixture": 7, "stages": [7, {"mixture": [3]}]}])
def test_what_is_no_section_names_none(saved: object) -> None:
    assert folders_of(saved) == []
