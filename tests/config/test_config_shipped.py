"""Recipes, clusters and sweeps by name, wherever their path may stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from nlscale.cluster.machines import load_cluster
from nlscale.config import recipe, shipped
from nlscale.errors import UserError
from nlscale.scaling.sweep.spec import read_sweep


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far from a clone."""
    monkeypatch.chdir(tmp_path)


def test_everything_has_a_name_and_says_what_it_is() -> None:
    found = [path for path in shipped.RECIPES.rglob("*.yaml")]
    assert len(found) > 10
    names = shipped.everything()
    assert {shipped.find(name) for name in names} == set(found)
    for name in names:
        assert len(shipped.about(shipped.find(name))) > 20, name


def test_a_name_stands_for_its_path() -> None:
    for name in ("hope-1.3b", "quickstart"):
        path = shipped.RECIPES / f"{name}.yaml"
        assert recipe.load(name).config == recipe.load(path).config
    by_path = load_cluster(shipped.RECIPES / "clusters/two-nodes.yaml")
    assert load_cluster("two-nodes") == load_cluster("clusters/two-nodes") == by_path
    sweep = read_sweep("quickstart")
    assert sweep.path == shipped.RECIPES / "sweeps/quickstart.yaml"
    assert recipe.load(sweep.recipe).config == recipe.load("quickstart").config


def test_a_file_of_that_name_goes_first() -> None:
    Path("quickstart").write_text("run: {dir: mine}\ndata: {dir: x}\n")
    assert recipe.load("quickstart").config.run.dir == "mine"


def test_a_folder_of_that_name_is_none() -> None:
    Path("quickstart").mkdir()
    assert recipe.load("quickstart").config.run.dir == "runs/quickstart"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("quikstart", "no recipe at quikstart; did you mean 'quickstart'?"),
        ("recipes/hope-1.4b.yaml", "no recipe at recipes/hope-1.4b.yaml; did you mean 'hope-1.3b'"),
        ("tasks/party", "no recipe at tasks/party; did you mean 'tasks/parity'?"),
        ("tasks/zzz", "no recipe at tasks/zzz; give a path, or one of tasks/aa, tasks/abab"),
        ("zzz", "no recipe at zzz; give a path, or one of bench-sync, hope-1.3b"),
        ("../setup", "no recipe at ../setup; "),
        ("train.steps=3", "is an override; give the recipe before it: a path, or one of bench"),
    ],
)
def test_what_is_none_is_told_what_there_is(given: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        recipe.load(given)
    assert says in str(error.value)
