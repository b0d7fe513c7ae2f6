"""Who owns a folder: real processes that start at once, are killed, stopped, and requeued."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cluster.life import owners

from nlscale.cluster.life import generations, owner
from nlscale.cluster.life.owner import Held, LostOwnership, hold, newest, refuse_if_alive
from nlscale.errors import UserError

Process = subprocess.Popen[str]


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    """Those that a test starts; they end with it."""
    started: list[Process] = []
    yield started
    for process in started:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a run has left something already."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "metrics.jsonl").write_text("{}\n")
    return path


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is on another machine, as far as it can be told, and in a hurry."""
    boot = tmp_path / "boot_id"
    boot.write_text("another boot\n")
    monkeypatch.setattr(generations, "_BOOT", boot)
    for name in ("BEAT_SECONDS", "SILENT_SECONDS", "TRUST_SECONDS"):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards
    owners.hurry()


def owned_by(folder: Path, processes: list[Process], **environment: str) -> Process:
    """A process that owns the folder."""
    process = owners.start("own", folder, **environment)
    processes.append(process)
    assert process.stdout is not None and process.stdout.readline() == "holds\n"
    return process


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def chain(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".owner-*"))


def rewrite(folder: Path, **changes: Any) -> None:
    """Let the last generation say something else."""
    path = folder / f".owner-{newest(folder):08d}"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_second_is_refused_and_told_who_since_when_and_what_to_do(
    folder: Path, processes: list[Process]
) -> None:
    first = owned_by(folder, processes, SLURM_JOB_ID="77")
    before = bytes_in(folder)
    for take in (lambda: refuse_if_alive(folder), lambda: hold(folder, "x").__enter__()):
        with pytest.raises(Held) as refused:
            take()
        said = str(refused.value)
        assert f"process {first.pid} on {os.uname().nodename} (Slurm job 77)" in said
        assert time.strftime("since %Y-%m-%d") in said and "scancel 77" in said
        assert "another run.dir" in said and "\n" not in said
    assert bytes_in(folder) == before


def test_of_many_that_start_at_once_one_is_inside(tmp_path: Path, processes: list[Process]) -> None:
    rounds, together = 25, 4
    begin = time.time() + 1.5
    processes += [owners.start("contend", tmp_path, rounds, begin) for _ in range(together)]
    said = [process.communicate(timeout=60) for process in processes]
    assert all(process.returncode == 0 for process in processes), said
    for outcomes in zip(*(out.splitlines()[1:] for out, _ in said), strict=True):
        assert "held" in outcomes


def test_after_kill_9_the_next_goes_on_at_once(folder: Path, processes: list[Process]) -> None:
    first = owned_by(folder, processes)
    os.kill(first.pid, signal.SIGKILL)
    while owner.start_of(first.pid) is not None:  # a zombie: nobody has waited for it
        time.sleep(0.01)
    began = time.monotonic()
    with hold(folder, "x") as owned:
        assert owned.number == 2 and chain(folder) == [".owner-00000002"]
    assert time.monotonic() - began < 1


def test_an_heir_that_is_killed_at_any_operation_leaves_a_folder_to_take(
    folder: Path,
) -> None:
    dead = killed = 0
    while not dead:
        process = owners.start("killed_at", folder, killed + 1)
        out, said = process.communicate(timeout=30)
        dead = int(out) if process.returncode == 0 else 0
        assert dead or process.returncode == -signal.SIGKILL, said
        killed += not dead
        with hold(folder, "x"):
            assert len(chain(folder)) == 1, "what it had begun is cleared away"
    assert killed >= 8, "create, write, sync, link, unlink, remove, and the release"
    assert bytes_in(folder)["metrics.jsonl"] == b"{}\n"


@pytest.mark.usefixtures("elsewhere")
def test_an_owner_elsewhere_that_beats_is_left_alone(
    folder: Path, processes: list[Process]
) -> None:
    owned_by(folder, processes)
    refuse_if_alive(folder)  # nothing is certain from here
    said: list[str] = []
    began = time.monotonic()
    with pytest.raises(Held), hold(folder, "x", say=said.append):
        pass
    assert time.monotonic() - began < owner.SILENT_SECONDS
    assert len(said) == 1 and "waiting 1 s for a sign of life" in said[0]


@pytest.mark.usefixtures("elsewhere")
def test_one_that_was_stopped_and_succeeded_writes_nothing_more(
    folder: Path, processes: list[Process]
) -> None:
    first = owned_by(folder, processes)
    os.kill(first.pid, signal.SIGSTOP)
    with hold(folder, "the heir") as owned:
        assert first.stdin is not None and first.stdout is not None
        first.stdin.write("\n")
        first.stdin.flush()
        os.kill(first.pid, signal.SIGCONT)
        said = first.stdout.readline()
        assert said.startswith(f"lost: {folder} was taken over by the heir, process {os.getpid()}")
        first.communicate(timeout=30)
        owned.check()
        assert chain(folder) == [".owner-00000002"], "its release changes nothing"
    assert LostOwnership.exit_code == 3


def test_one_that_was_stopped_here_is_alive(folder: Path, processes: list[Process]) -> None:
    first = owned_by(folder, processes)
    os.kill(first.pid, signal.SIGSTOP)
    with pytest.raises(Held):
        refuse_if_alive(folder)


def test_a_requeued_job_does_not_wait_for_its_earlier_start(
    folder: Path, processes: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    owned_by(folder, processes, SLURM_JOB_ID="7")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(Held), hold(folder, "another step of the same start"):
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    refuse_if_alive(folder)
    with hold(folder, "x") as owned:
        assert owned.number == 2


@pytest.mark.usefixtures("elsewhere")
def test_a_copy_of_a_folder_that_is_held_may_be_taken(
    folder: Path, processes: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # on the same machine
    owned_by(folder, processes)
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    refuse_if_alive(copy)
    owners.hurry(silent=0.3)
    try:
        with hold(copy, "x", say=lambda line: None) as owned:
            assert owned.number == 2
    finally:
        owner.BEAT_SECONDS, owner.SILENT_SECONDS, owner.TRUST_SECONDS = 5.0, 60.0, 15.0


def test_a_link_whose_answer_was_lost_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def made_and_not_said(source: Any, target: Any) -> None:
        link(source, target)
        raise OSError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", made_and_not_said)
    with hold(folder, "x") as owned:
        assert owned.number == 1 and chain(folder) == [".owner-00000001"]


@pytest.mark.usefixtures("elsewhere")
def test_without_hard_links_a_file_that_was_cut_short_is_watched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(source: Any, target: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    (folder / ".owner-00000004").write_text('{"what": "nls')
    said: list[str] = []
    with hold(folder, "x", say=said.append) as owned:
        assert owned.number == 5 and "did not end it" in said[0]
        assert chain(folder) == [".owner-00000005"]
        with pytest.raises(Held), hold(folder.parent / "run", "y") as again:
            assert again is owned, "the same process holds it once more"
            raise Held("as it would be")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\x00\xff", b'{"what": 3}', b"[" * 100_000]
)
@pytest.mark.usefixtures("elsewhere")
def test_a_damaged_file_blocks_nobody_for_ever(folder: Path, content: bytes) -> None:
    owner.SILENT_SECONDS = 0.2
    (folder / ".owner-00000004").write_bytes(content)
    with hold(folder, "x", say=lambda line: None) as owned:
        assert owned.number == 5


def test_what_was_made_for_nothing_goes_and_a_named_thing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold(tmp_path / "a" / "b", "x"):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())
    with hold(tmp_path, "x", name="export"):
        assert chain(tmp_path) == [".owner-export-00000001"]
        with hold(tmp_path, "y"):
            assert len(chain(tmp_path)) == 2
    assert chain(tmp_path) == [".owner-00000001"]


def test_an_owner_whose_file_is_taken_away_stops(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "TRUST_SECONDS", 0.0)
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.1)
    with hold(folder, "x") as owned:
        owned.check()
        shutil.rmtree(folder)
        owned.check()  # a listing may have lacked it for a moment
        time.sleep(0.3)
        with pytest.raises(LostOwnership, match="was removed; nothing more is written there"):
            owned.check()
    assert not folder.exists()


def test_where_a_folder_cannot_be_made_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/run: Not a directory"):
        hold(tmp_path / "file" / "run", "x").__enter__()
    with pytest.raises(UserError, match=r"cannot write .*file: Not a directory"):
        hold(tmp_path / "file", "x").__enter__()
    refuse_if_alive(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.root
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    try:
        filler = disk / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        for place in (disk, disk / "run"):
            with pytest.raises(UserError, match="No space left on device; mend that"):
                hold(place, "x").__enter__()
        assert [path.name for path in disk.iterdir()] == ["filler"]
        filler.unlink()
        with hold(disk, "x"), suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        assert len(chain(disk)) == 1, "it could not be released, and that is no failure"
    finally:
        subprocess.run(["umount", str(disk)], check=True)
