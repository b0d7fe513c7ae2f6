"""Training on shards that lie on another service: as on a folder of this machine."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import world
from data.remote.servers import Server
from train.test_train_run import SMALL, records, run

from nlscale.config import recipe
from nlscale.data.build import build
from nlscale.errors import UserError
from nlscale.train.prepare import prepare


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 15 shards of a few kilobytes."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    for i in range(30):
        (folder / f"{i}.txt").write_text("".join(draw.choices("abcdef ", k=2000)))
    build(
        [str(folder)], "bytes", folder / "data", held_out=0.1, shard_tokens=4096, block_tokens=1024
    )
    return folder / "data"


def sizes(data: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in data.glob("*.tar")}


def curve(run_dir: Path) -> list[Any]:
    found = records(run_dir, "train") + records(run_dir, "validation")
    return [(record["step"], record["loss"]) for record in found]


def test_losses_are_those_of_the_local_folder(data: Path, tmp_path: Path) -> None:
    short = "train.validate_every=9"
    world.run(2, run, [f"data.dir={data}", f"run.dir={tmp_path}/here", short])
    whole = sum(sizes(data).values())
    with Server(data) as server:
        there = [f"data.dir={server.url}/", f"data.cache.dir={tmp_path}/cache"]
        there += [f"data.cache.size={whole * 2 // 3} B", "data.cache.threads=2"]
        first, second = world.run(2, run, [*there, f"run.dir={tmp_path}/there", short])
    assert first["steps"] == second["steps"] == 9
    assert curve(tmp_path / "there") == curve(tmp_path / "here")
    assert sum(server.asked.values()) > len(sizes(data)) + 2, "some should be fetched again"
    assert (
        f"holds 67% of the {whole / 1e3:.3g} kB of shards"
        in (tmp_path / "there" / "train.log").read_text()
    )
    assert (tmp_path / "there" / "config.yaml").read_text().count(f"dir: {server.url}\n") == 1


def test_a_shard_that_lies_ends_the_run_on_all_ranks(data: Path, tmp_path: Path) -> None:
    with Server(data) as server:
        server.always = dict.fromkeys(sizes(data), "lie")
        there = [f"data.dir={server.url}", f"data.cache.dir={tmp_path}/cache"]
        ended = world.run(2, run, [*there, f"run.dir={tmp_path}/run"])
    assert [rank["code"] for rank in ended] == [2, 2]
    assert any("was altered: its sha256 differs from the index" in r["error"] for r in ended), ended


def test_a_cache_that_is_too_small_is_refused(data: Path, tmp_path: Path) -> None:
    with Server(data) as server:
        there = [*SMALL, f"data.dir={server.url}", f"data.cache.dir={tmp_path}"]
        config = recipe.load(None, [*there, "data.cache.size=10 kB"]).config
        says = (
            r"data\.cache\.size is 10 kB, and the 8 samples that this machine reads in a step may "
            r"lie in shards of [\d.]+ kB; give at least that, best [\d.]+ kB for all"
        )
        with pytest.raises(UserError, match=says):
            prepare(config)
        config = recipe.load(None, [*there, "data.cache.size=1 TB"]).config
        assert prepare(config).notes == []


def test_shards_that_are_missing_are_named_before_the_run(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in data.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "train-000003.tar").unlink()
    there = [f"data.dir=file://{copy}", f"data.cache.dir={tmp_path}/cache"]
    (ended,) = world.run(1, run, [*there, f"run.dir={tmp_path}/run"])
    assert f"shard file://{copy}/train-000003.tar is missing" in ended["error"]
    assert not (tmp_path / "run").exists()
