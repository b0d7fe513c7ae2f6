"""What lies in run.dir is compared, refused or kept before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import world
from train.test_train_run import SMALL, records, run, small_data

from nlscale.checkpoint.store.store import Store
from nlscale.config import recipe
from nlscale.errors import UserError
from nlscale.train.found import Found, look, make_room

DATA = {"fingerprint": "x", "train_tokens": 10}


def found(folder: Path, *overrides: str) -> Found:
    """What a run without a checkpoint finds in a folder."""
    config = recipe.load(None, [*SMALL, "data.dir=none", f"run.dir={folder}", *overrides]).config
    return look(config, DATA, folder, Store(folder / "checkpoints"))


def begun(folder: Path) -> None:
    """A run that has validated and taken a step, and was killed before its first checkpoint."""
    folder.mkdir(exist_ok=True)
    config = recipe.load(None, [*SMALL, "data.dir=none", f"run.dir={folder}"]).config
    recipe.write(config, folder / "config.yaml")
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_empty_folder_none_at_all_and_the_same_run_are_free(tmp_path: Path) -> None:
    assert found(tmp_path / "none") == Found() == found(tmp_path)
    (tmp_path / "output.log").write_text("of a sweep")
    assert found(tmp_path) == Found()
    begun(tmp_path)
    assert found(tmp_path, "run.max_restarts=9").summary is None
    assert not list(tmp_path.glob(".partial*"))


def test_checkpoints_that_say_nothing_stop_a_run_before_anything_is_replaced(
    tmp_path: Path,
) -> None:
    begun(tmp_path)
    broken = tmp_path / "checkpoints" / "step-00000004"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{")
    before = bytes_in(tmp_path)
    for summary in (None, '{"final_val_loss": 2.0}'):
        if summary is not None:
            (tmp_path / "summary.json").write_text(summary)
            before = bytes_in(tmp_path)
        with pytest.raises(UserError, match=r"none of the 1 checkpoints in .* is whole"):
            found(tmp_path, "optimizer.learning_rate=0.5")
        assert bytes_in(tmp_path) == before


def test_another_run_without_a_checkpoint_is_refused_by_its_keys(tmp_path: Path) -> None:
    begun(tmp_path)
    before = bytes_in(tmp_path)
    with pytest.raises(UserError) as refused:
        found(tmp_path, "optimizer.learning_rate=0.5", "model.layers=4")
    said = str(refused.value)
    assert "model.layers 2 -> 4, optimizer.learning_rate 0.001 -> 0.5" in said
    assert "'resume.allow=[model.layers,optimizer.learning_rate]'" in said and "\n" not in said
    assert bytes_in(tmp_path) == before
    allowed = "resume.allow=[model.layers,optimizer.learning_rate]"
    found(tmp_path, "optimizer.learning_rate=0.5", "model.layers=4", allowed)


@pytest.mark.parametrize(
    "content",
    [b"a: 1\n", b"{}", b"[1, 2]", b"\x00\xff\xfe", b"model:\n  layers: 2\n"],
    ids=["mapping", "empty-mapping", "list", "binary", "recipe"],
)
def test_a_config_of_someone_else_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml is not one that nlscale wrote"):
        found(tmp_path)
    assert (tmp_path / "config.yaml").read_bytes() == content


def test_a_config_that_was_cut_short_needs_someone_where_records_depend_on_it(
    tmp_path: Path,
) -> None:
    begun(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"config\.yaml is damaged, and no checkpoint says"):
        found(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    there = found(tmp_path)
    assert "is damaged, and is written anew" in there.warnings[0]
    make_room(there, tmp_path)
    assert (tmp_path / "config-damaged.yaml").exists() and not path.exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "loss.png"])
def test_files_of_no_known_run_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("something")
    with pytest.raises(UserError, match=rf"holds a {name}, and neither a config\.yaml nor"):
        found(tmp_path)


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"run\.dir .*run is a file"):
        found(tmp_path / "run")


def test_a_name_that_is_kept_already_is_not_replaced(tmp_path: Path) -> None:
    begun(tmp_path)
    for content in (b"1", b"2", b"3"):
        (tmp_path / "loss.png").write_bytes(content)
        make_room(found(tmp_path), tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("loss*")}
    assert kept == {
        "loss-before.png": b"1", "loss-before-2.png": b"2", "loss-before-3.png": b"3"
    }  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("text"), documents=20, held_out=0.1)


def at(data: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    here = [f"data.dir={data}", f"run.dir={folder}", "checkpoint.every=4 steps", "train.steps=8"]
    (result,) = world.run(1, run, [*here, "checkpoint.keep=9", *overrides])
    return dict(result)


def test_a_finished_run_goes_on_when_it_is_to_be_longer(data: Path, tmp_path: Path) -> None:
    first = at(data, tmp_path)
    before = bytes_in(tmp_path)
    refused = at(data, tmp_path, "train.steps=12")["error"]
    start = f"run.dir=NEW resume.start={tmp_path}/checkpoints/step-00000008"
    assert "'resume.allow=[train.steps]'" in refused and start in refused
    assert "remove" not in refused
    other = at(data, tmp_path, "train.steps=12", "optimizer.beta1=0.5")["error"]
    assert "another finished run: optimizer.beta1 0.9 -> 0.5; give another run.dir" in other
    nothing = at(data, tmp_path, "optimizer.beta1=0.5", "resume.allow=[optimizer.beta1]")["error"]
    assert "would change nothing" in nothing
    fewer = at(data, tmp_path, "train.steps=4")["error"]
    assert "has finished with train.steps=8" in fewer
    unchanged = {k: v for k, v in bytes_in(tmp_path).items() if not k.startswith(".owner")}
    assert unchanged == {k: v for k, v in before.items() if not k.startswith(".owner")}

    longer = at(data, tmp_path, "train.steps=12", "resume.allow=[train.steps]")
    assert longer["steps"] == 12 and longer["tokens"] == 12 * 8 * 32
    assert [r["step"] for r in records(tmp_path, "train")] == list(range(1, 13))
    assert json.loads((tmp_path / "summary-step-8.json").read_text()) == first
    assert (tmp_path / "loss-step-8.png").read_bytes() == before["loss.png"]
    assert "it goes on to 12" in (tmp_path / "train.log").read_text()
    assert at(data, tmp_path, "train.steps=12") == longer, "now it is this run that has finished"


def test_a_run_with_wsd_branches_where_its_learning_rate_began_to_fall(
    data: Path, tmp_path: Path
) -> None:
    wsd = ["optimizer.schedule=wsd", "optimizer.decay_fraction=0.5"]
    at(data, tmp_path / "a", *wsd)
    refused = at(data, tmp_path / "a", *wsd, "train.steps=12")["error"]
    start = f"resume.start={tmp_path}/a/checkpoints/step-00000004"
    assert f"run.dir=NEW {start}" in refused and refused.count("resume.allow") == 1
    branch = at(data, tmp_path / "b", *wsd, "train.steps=12", start)
    assert branch["steps"] == 12
    assert [r["step"] for r in records(tmp_path / "b", "train")] == list(range(5, 13))


def test_damaged_files_beside_whole_checkpoints_are_said_and_made_again(
    data: Path, tmp_path: Path
) -> None:
    first = at(data, tmp_path)
    summary = tmp_path / "summary.json"
    for content in (b"", b"{}", b"[]", b"\x00\xff", summary.read_bytes()[:50]):
        summary.write_bytes(content)
        (tmp_path / "config.yaml").write_bytes((tmp_path / "config.yaml").read_bytes()[:300])
        with (tmp_path / "metrics.jsonl").open("ab") as file:
            file.write(b'[1]\nnot json\n{"kind": "train"}\n')
        with (tmp_path / "attempts.jsonl").open("ab") as file:
            file.write(b'7\n{"event": "begin"}\n\xff\n')
        again = at(data, tmp_path)
        assert again["final_val_loss"] == first["final_val_loss"], content
        assert again["steps"] == 8 and json.loads(summary.read_text()) == again
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert all(json.loads(line)["step"] <= 8 for line in lines)
    log = (tmp_path / "train.log").read_text()
    assert f"warning: {summary} is damaged: it is empty; the run counts as not finished" in log
    assert "config.yaml is damaged, and is written anew" in log
    assert "3 lines are no record; set aside in" in log
    assert "attempts.jsonl: 3 lines are no event of a start" in log
    aside = [json.loads(line) for line in (tmp_path / "set-aside.jsonl").read_text().splitlines()]
    assert {"kind": "unreadable", "line": "not json"} in aside


def test_the_same_run_before_its_first_checkpoint_begins_anew_and_keeps_its_records(
    data: Path, tmp_path: Path
) -> None:
    here = ["checkpoint.every=null", "train.steps=3"]
    at(data, tmp_path, *here)
    (tmp_path / "summary.json").unlink()
    lines = (tmp_path / "metrics.jsonl").read_text()
    at(data, tmp_path, *here)
    assert (tmp_path / "set-aside.jsonl").read_text() == lines
    said = "records of steps 0 to 3 (5 of them) are set aside in"
    assert (tmp_path / "train.log").read_text().count(said) == 1
    assert [r["step"] for r in records(tmp_path, "train")] == [1, 2, 3]
    assert (tmp_path / "loss-before.png").exists()
