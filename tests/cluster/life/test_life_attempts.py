"""What is known of a run's starts: when to give up, and where the time went."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from nlscale.cluster.life.attempts import FILE, Attempts, goodput, time_spent
from nlscale.cluster.life.deadline import VARIABLE, Deadline
from nlscale.errors import GaveUp, UserError


def train(step: int, seconds: float, dropped: int = 0, waited: float = 0.0) -> dict[str, object]:
    return {
        "kind": "train", "step": step, "step_seconds": seconds, "dropped_steps": dropped,
        "checkpoint_seconds": waited,
    }  # fmt: skip


def start(folder: Path, job: str | None, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One start that goes on from that step, allowed to follow two that got nowhere."""
    if job is None:
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    else:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    attempts = Attempts(folder)
    attempts.check(step, most=2)
    attempts.begin(time.time(), step, 0.0, None)


def test_a_job_gives_up_when_it_gets_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        start(tmp_path, "7", 10, monkeypatch)
    Attempts(tmp_path).end("rank 3 was lost")
    with pytest.raises(GaveUp, match=r"3 times by Slurm job 7 .* step 10.*rank 3 was lost") as gave:
        start(tmp_path, "7", 10, monkeypatch)
    assert gave.value.exit_code == 4
    start(tmp_path, "8", 10, monkeypatch)  # submitted again: it counts anew
    for _ in range(5):
        start(tmp_path, None, 10, monkeypatch)  # by hand, as often as one likes


def test_progress_is_what_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (0, 0, 0, 10, 10, 10, 20, 30, 40, 50, 50, 50):
        start(tmp_path, "7", step, monkeypatch)
    with pytest.raises(GaveUp):
        start(tmp_path, "7", 50, monkeypatch)


def test_a_line_torn_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    Attempts(tmp_path).end("first")
    with (tmp_path / FILE).open("a") as file:
        file.write('{"event": "en')
    assert [event["reason"] for event in Attempts(tmp_path).events] == ["first"]


def test_goodput_accounts_for_all_the_time() -> None:
    # from 0 to 10: start-up 4 s, steps; killed, 6 s of steps lost, down until 30; start-up 5 s
    events = [
        {"event": "begin", "time": 0.0, "trains": 4.0, "redone": 0.0, "down": 0.0},
        {"event": "begin", "time": 30.0, "trains": 35.0, "redone": 6.0, "down": 20.0},
    ]
    records = [
        {"kind": "validation", "step": 0, "seconds": 2.0},
        train(1, 3.0),
        train(2, 4.0, waited=0.5),
        train(3, 5.0, dropped=1),
        train(4, 6.0, dropped=1),
    ]
    assert time_spent(records) == {
        "training": 13.0, "dropped": 5.0, "validation": 2.0, "checkpoints": 0.5
    }  # fmt: skip
    shares = goodput(events, records, now=100.0)
    assert shares["wall_seconds"] == 100.0
    assert shares["training"] == pytest.approx(0.13)
    assert shares["startup"] == pytest.approx(0.09)
    assert shares["redone"] == pytest.approx(0.06)
    assert shares["down"] == pytest.approx(0.20)
    assert sum(v for k, v in shares.items() if k != "wall_seconds") == pytest.approx(1.0)
    json.dumps(shares)


def test_a_run_stops_in_time_for_its_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not Deadline().is_near(seconds=1e9, save_seconds=1e9)
    monkeypatch.setenv(VARIABLE, str(time.time() + 300))
    assert not Deadline().is_near(seconds=2.0, save_seconds=100.0)
    assert Deadline().is_near(seconds=2.0, save_seconds=150.0), "a slower save: stop earlier"
    assert Deadline().is_near(seconds=300.0, save_seconds=1.0)
    Deadline().refuse_past()
    for text in ("tomorrow", "nan", "inf"):
        monkeypatch.setenv(VARIABLE, text)
        with pytest.raises(UserError, match=f"'{text}' is not a time in Unix seconds"):
            Deadline()
    monkeypatch.setenv(VARIABLE, str(time.time() - 100))
    with pytest.raises(UserError, match=r"has passed, 100 s ago: it is of another job"):
        Deadline().refuse_past()


def test_lines_that_are_no_events_are_passed_over_counted_and_kept(tmp_path: Path) -> None:
    path = tmp_path / FILE
    Attempts(tmp_path).end("first")
    bad = b'7\n[]\n{}\n{"event": "begin"}\n{"event": "end"}\n\xff\x00\n{"event": ["end"]}\n'
    with path.open("ab") as file:
        file.write(bad + b'{"event": "en')
    attempts = Attempts(tmp_path)
    assert attempts.unreadable == 8 and "8 lines are no event" in attempts.warnings()[0]
    attempts.begin(time.time(), 3, 0.0, None)
    assert bad in path.read_bytes()
    again = Attempts(tmp_path)
    assert [event["event"] for event in again.events] == ["end", "begin"], "not glued to a torn one"
    assert goodput(again.events, [{"kind": "train"}, {}], time.time() + 1)["training"] == 0


def test_who_may_not_write_notes_no_end(tmp_path: Path) -> None:
    Attempts(tmp_path / "run", lambda: False).end("refused")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_a_clear_error_at_the_beginning(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    (tmp_path / FILE).symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot append to .*attempts\.jsonl: No space left"):
        attempts.begin(time.time(), 0, 0.0, None)
