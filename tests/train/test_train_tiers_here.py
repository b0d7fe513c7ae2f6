"""What a machine lacks for levels on a drive, or on its CPU, is said before a run starts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import world
from disks import MIB, Disk, small_disk
from ops.plain_ops import PlainAsyncIo, stand_in
from train.test_train_resume import RECIPE
from train.test_train_run import SMALL, records, run, small_data

from nlscale.checkpoint.store.store import Store
from nlscale.cluster.life.place import place
from nlscale.config import recipe
from nlscale.errors import UserError
from nlscale.ops import compiled
from nlscale.train import tiers_here

KEYS = [
    "data.dir=none", "model.layers=2", "model.d_model=64", "model.heads=4", "train.dtype=bf16",
    "levels=[{period: 1}, {period: 4, memory: nvme}]",
]  # fmt: skip


def check(folder: Path, *more: str) -> None:
    config = recipe.load(None, [*KEYS, f"tiers.folder={folder}", *more]).config
    tiers_here.check_tiers_here(config, 256, 1)


def test_a_folder_is_refused_for_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"memory=nvme needs .*`nlscale doctor --build async_io`"):
        check(tmp_path)
    monkeypatch.setattr(compiled, "check", lambda name: {})
    check(tmp_path)
    with pytest.raises(UserError, match=r"is no folder on .*; make it on every node"):
        check(tmp_path / "none")
    with monkeypatch.context() as patched:
        patched.setattr(tiers_here, "file_system", lambda path: "nfs4")
        with pytest.raises(UserError, match=r"is on a network file system \(nfs4\); give"):
            check(tmp_path)
    with pytest.raises(UserError, match=r"free, and the ranks of a node put .* there; free some"):
        tiers_here.check_folder(tmp_path, 1e18)
    assert not [*tmp_path.iterdir()]


def trained_on_a_failing_drive(overrides: list[str], write: int) -> dict[str, Any]:
    """On a rank of a world: what the run says when the last rank's drive loses a write."""
    stand_in()
    failing = ("write", write) if place().rank == place().world - 1 else None
    PlainAsyncIo.fault = staticmethod(
        lambda kind, number, path: 0.0 if (kind, number) == failing else None
    )
    return run(overrides)


def test_a_failing_drive_ends_the_run_with_a_line_and_its_checkpoint_whole(
    tmp_path: Path,
) -> None:
    (tmp_path / "slots").mkdir()
    data = small_data(tmp_path, documents=20, held_out=0.1)
    keys = [
        f"data.dir={data}", f"run.dir={tmp_path / 'run'}", f"tiers.folder={tmp_path / 'slots'}",
        "levels=[{period: 1}, {period: 2, memory: nvme}]", "checkpoint.steps=[2]",
        "train.steps=6", "levels.stagger=false",
    ]  # fmt: skip
    given = keys, 2  # the update of step 4; it is read again at step 6
    ended = world.run(2, trained_on_a_failing_drive, *given, ranks_per_node=1)
    assert [own["code"] for own in ended] == [3, 3]
    for own in ended[1:]:
        assert "\n" not in own["error"]
        assert "level 1, phase 0," in own["error"]
        assert "holds version" in own["error"] and "goes on from its checkpoint" in own["error"]
    (saved,) = Store(tmp_path / "run" / "checkpoints").checkpoints()
    saved.verify()
    assert saved.step == 2


def meets_a_drive(disk: Disk, fills_up: bool) -> None:
    """Before the command of a rank: the last one's drive is that, and may fill up once the run has
    been allowed."""
    stand_in()
    if place().rank < place().world - 1:
        return
    disk.enter()
    if fills_up:
        checked = tiers_here.check_folder

        def and_then_it_is_full(*given: Any) -> None:
            checked(*given)
            disk.fill()

        tiers_here.check_folder = and_then_it_is_full


@pytest.mark.root
def test_a_drive_that_is_full_refuses_the_run_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one: before the ranks meet, and where others have taken its room since."""
    data = small_data(tmp_path, documents=4, held_out=0.2)
    with small_disk(tmp_path, 16) as disk:
        argv = [
            "train", RECIPE, *SMALL, f"data.dir={data}", f"run.dir={tmp_path / 'run'}",
            f"tiers.folder={disk.folder}", "levels=[{period: 1}, {period: 2, memory: nvme}]",
            "optimizer.rule=adamw",
        ]  # fmt: skip
        late = world.command(
            2, argv, tmp_path / "late", before=partial(meets_a_drive, disk, True), ranks_per_node=1
        )
        said = "".join(rank.output for rank in late)
        assert [rank.code for rank in late] == [2, 2], said
        assert said.count("nlscale: ") == 1, said
        assert f"nlscale: tiers.folder {disk.folder} has no room for" in said
        assert not records(tmp_path / "run", "train")

        before = partial(meets_a_drive, disk, False)
        (alone,) = world.command(1, argv, tmp_path / "full", before=before)
        assert alone.code == 2 and alone.output.count("\n") == 1, alone.output
        assert f"tiers.folder {disk.folder} has 0 B free, and the ranks" in alone.output

        monkeypatch.setattr(compiled, "check", lambda name: {})
        disk.filler.unlink()
        disk.fill(left=MIB // 2)
        check(disk.seen)
        with pytest.raises(UserError, match=r"there, and run\.dir a checkpoint of .*; free some"):
            check(disk.seen, f"run.dir={disk.seen / 'runs' / 'run'}")
