"""Two starts of one run, and a run whose folder is taken over while it trains."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import world
from cluster.life import owners
from train.test_train_resume import RECIPE, wait_for_steps
from train.test_train_run import SMALL, records, small_data

from nlscale.cluster.life.owner import newest

STEPS = 12


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = small_data(tmp_path_factory.mktemp("text"), documents=4, held_out=0.2)
    return [
        *("train", RECIPE, *SMALL, f"data.dir={data}", f"train.steps={STEPS}"),
        "timeouts.silence=300",
        "checkpoint.every=1000 steps",
    ]


def what_lies_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_second_start_is_refused_and_the_first_does_not_notice(
    command: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    here = [*command, f"run.dir={folder}"]

    def start_again(pids: list[int]) -> None:
        wait_for_steps(folder, 2)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # so that it is there for long enough
        before = what_lies_in(folder)
        for other in ([], ["optimizer.learning_rate=0.5"]):
            second = world.command(2, [*here, *other], tmp_path / "second")
            said = "".join(rank.output for rank in second)
            assert [rank.code for rank in second] == [2, 2], said
            assert said.count("nlscale: ") == 1, said
            assert f"{folder} is held by nlscale train, process {pids[0]} on " in said
        assert what_lies_in(folder) == before
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    first = world.command(2, here, tmp_path / "first", start_again)
    assert [rank.code for rank in first] == [0, 0], first[0].output
    assert [r["step"] for r in records(folder, "train")] == list(range(1, STEPS + 1))
    assert (folder / "attempts.jsonl").read_text().count("\n") == 1


def test_a_run_that_is_succeeded_ends_and_writes_nothing_more(
    command: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    seen: dict[str, bytes] = {}

    def take_over(pids: list[int]) -> None:
        wait_for_steps(folder, 2)
        path = folder / f".owner-{newest(folder):08d}"
        heir = json.loads(path.read_text()) | {"host": "n7", "pid": 4711, "boot": "another"}
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        (folder / ".owner-00000007").write_text(json.dumps(heir))
        path.unlink()
        seen.update((p.name, p.read_bytes()) for p in folder.iterdir() if p.is_file())
        time.sleep(1.0)  # longer than it trusts
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    ended = world.command(
        2, [*command, f"run.dir={folder}"], tmp_path / "ranks", take_over, before=owners.hurry
    )
    said = "".join(rank.output for rank in ended)
    assert [rank.code for rank in ended] == [3, 3], said
    assert said.count("nlscale: ") == 1
    assert "was taken over by nlscale train, process 4711 on n7: nlscale train, process" in said
    for name in ("metrics.jsonl", "attempts.jsonl", "config.yaml", ".owner-00000007"):
        assert (folder / name).read_bytes() == seen[name], name
    assert newest(folder) == 7 and not (folder / "checkpoints" / "LATEST").exists()


def test_after_kill_9_the_same_command_goes_on_at_once(command: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    here = [*command, f"run.dir={folder}", "train.steps=6"]

    def kill(pids: list[int]) -> None:
        while not newest(folder):
            time.sleep(0.005)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    killed = world.command(2, here, tmp_path / "killed", kill)
    assert {rank.code for rank in killed} == {-9}
    began = time.monotonic()
    (alone,) = world.command(1, here, tmp_path / "again")
    assert alone.code == 0 and time.monotonic() - began < 55, alone.output
    assert "sign of life" not in alone.output
    assert [r["step"] for r in records(folder, "train")] == [1, 2, 3, 4, 5, 6]
