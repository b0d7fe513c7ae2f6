"""Copies to an S3 server and back: whole or not there, whatever the server does meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import world
from checkpoint import stores
from checkpoint.mirror.mirrors import config_of, holds, saved, taken, until
from checkpoint.mirror.servers import BUCKET, Server

from nlscale.checkpoint.mirror import copier as copiers
from nlscale.checkpoint.mirror import remote as remotes
from nlscale.checkpoint.mirror.check import probe_mirror
from nlscale.checkpoint.mirror.copier import Copier
from nlscale.checkpoint.mirror.fetch import fetch_newest
from nlscale.checkpoint.mirror.label import RUN, Label, finished
from nlscale.checkpoint.mirror.remote import LATEST, MANIFEST, Remote
from nlscale.checkpoint.store.pieces import Piece
from nlscale.checkpoint.store.store import Store
from nlscale.errors import UserError

URL = f"s3://{BUCKET}/runs/a"


@pytest.fixture(scope="module")
def one_server() -> Iterator[Server]:
    server = Server()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def server(one_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    for name, value in one_server.environment.items():
        monkeypatch.setenv(name, value)
    one_server.make_bucket()
    return one_server


class Run:
    """A run with a mirror."""

    def __init__(self, path: Path, *overrides: str) -> None:
        self.folder = path / "checkpoints"
        self.said: list[str] = []
        self.warned: list[str] = []
        self.label = taken(URL, path, *overrides)
        self.remote = self.label.remote
        config = config_of(URL, *overrides).checkpoint
        self.copier = Copier(self.label, config, self.said.append, self.warned.append)

    def save(self, step: int, seed: int | None = None) -> None:
        self.copier.offer(saved(self.folder, step, seed))

    def is_idle(self) -> bool:
        return self.copier._waiting is self.copier.copying is None

    def finish(self) -> bool:
        return self.copier.close(wait=True)


@pytest.fixture
def run(server: Server, tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path / "run")
    with run.copier:
        yield run


class Blocks:
    """Holds back what writes until it is told to go on."""

    def __init__(self, server: Server, ending: str = "") -> None:
        self.came, self.go_on = threading.Event(), threading.Event()
        self._ending = ending
        server.on_request = self

    def __call__(self, method: str, path: str) -> None:
        if method in ("PUT", "POST") and path.endswith(self._ending):
            self.came.set()
            assert self.go_on.wait(60)


def test_the_bytes_are_copied_and_the_manifest_last(
    server: Server, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remotes, "_PART", 5 << 20)  # the least that S3 takes
    asked: list[str] = []
    server.on_request = lambda method, path: asked.append(f"{method} {path}")
    large = torch.randn(3 << 20, generator=torch.Generator().manual_seed(1))
    pieces = [Piece("a", tuple(large.shape), (0,), large)]
    Store(run.folder).write(7, pieces, {"step": 7}, None)
    (checkpoint,) = Store(run.folder).checkpoints()
    run.copier.offer(checkpoint)
    assert run.finish() and not run.warned
    (line,) = run.said
    assert line.startswith(f"checkpoint of step 7 copied to {URL}: 12.6 MB in ")
    assert holds(run.remote, checkpoint)
    written = [one for one in asked if not one.startswith(("GET", "HEAD"))]
    parts = [one for one in written if one.endswith("/__0_0.distcp")]
    assert len(parts) == 4, "begun, two parts, ended"
    assert written[-2:] == [
        f"PUT /{BUCKET}/runs/a/{LATEST}",
        f"PUT /{BUCKET}/runs/a/step-00000007/{MANIFEST}",
    ]


def test_what_is_there_is_not_copied_again(server: Server, run: Run) -> None:
    run.save(1)
    until(run.is_idle)
    assert len(run.said) == 1
    asked: list[str] = []
    server.on_request = lambda method, path: asked.append(method)
    run.copier.offer(Store(run.folder).checkpoints()[-1])
    assert run.finish() and set(asked) <= {"GET", "HEAD"} and len(run.said) == 1


def test_a_server_that_refuses_from_any_request_on(server: Server, run: Run) -> None:
    """What it has then is what a process that was killed there leaves."""
    run.save(1)
    until(run.is_idle)
    for number in range(1, 100):
        step, count = 1 + number, iter(range(1, 1000))
        server.on_request = lambda method, path, n=number, c=count: next(c) >= n
        run.warned.clear()
        run.save(step)
        until(run.is_idle)
        server.on_request = lambda method, path: None
        if step in finished(run.remote):
            break
        assert len(run.warned) == 1 and "is not in the mirror: cannot " in run.warned[0]
    assert number > 8, "it was refused at each request of a copy"
    assert holds(run.remote, Store(run.folder).checkpoints()[-1])
    assert run.warned[0].startswith("older checkpoints were not removed from the mirror: cannot ")
    run.save(step + 1)
    assert run.finish() and sorted(run.remote.listing()) == [step, step + 1]


def test_killed_before_it_has_finished(server: Server, tmp_path: Path) -> None:
    """All files are there, and the checkpoint before is the newest."""
    path = tmp_path / "run"
    first = Run(path)
    first.save(1)
    assert first.finish()
    checkpoint = saved(path / "checkpoints", 2)
    process = multiprocessing.get_context("forkserver").Process(
        target=_copies_and_offers, args=(path, server.environment)
    )

    def kill(method: str, asked: str) -> None:
        if method == "PUT" and asked.endswith(LATEST):
            os.kill(process.pid or 0, signal.SIGKILL)

    server.on_request = kill
    process.start()
    process.join(60)
    server.on_request = lambda method, asked: None
    assert process.exitcode == -signal.SIGKILL
    assert finished(first.remote) == [1] and len(first.remote.listing()[2]) == 3
    found = fetch_newest(URL, Store(tmp_path / "fetched"), None, lambda line: None)
    assert found is not None and stores.holds(found, 1)
    again = Run(path)  # the next start offers it again
    again.copier.offer(checkpoint)
    assert again.finish() and holds(again.remote, checkpoint)


def _copies_and_offers(path: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    run = Run(path)
    run.copier.offer(Store(run.folder).checkpoints()[-1])
    run.finish()


def test_a_server_that_goes_away_and_comes_back(server: Server, run: Run) -> None:
    blocked = Blocks(server, ".distcp")
    run.save(1)
    assert blocked.came.wait(30)
    server.stop()
    server.on_request = lambda method, path: True
    blocked.go_on.set()
    until(lambda: bool(run.warned))
    assert run.warned[0].startswith("checkpoint of step 1 is not in the mirror: cannot ")
    run.save(2)
    until(lambda: len(run.warned) == 2)
    assert "onnect" in run.warned[1]
    server.on_request = lambda method, path: None
    server.start()
    run.save(3)
    assert run.finish() and len(run.warned) == 2
    assert finished(run.remote) == [3]
    assert holds(run.remote, Store(run.folder).checkpoints()[-1])


def test_a_slow_server_holds_nobody_up_and_gets_the_newest(server: Server, run: Run) -> None:
    blocked = Blocks(server)
    run.save(1)
    assert blocked.came.wait(30)
    for step in (2, 3, 4):
        run.save(step)  # returns, although nothing is answered
    assert run.copier.copying == 1
    blocked.go_on.set()
    assert run.finish() and not run.warned
    assert finished(run.remote) == [1, 4]
    assert [line for line in run.said if "slower" in line] == [
        f"checkpoint of step {step} is not copied to the mirror, which is slower than they come; "
        f"step {step + 1} is next"
        for step in (2, 3)
    ]


def test_the_end_waits_and_says_how_far_it_is(
    server: Server, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copiers, "PROGRESS_SECONDS", 0.0)
    blocked = Blocks(server, MANIFEST)
    run.save(1)

    def go_on() -> bool:
        if any("about" in line for line in run.said):
            blocked.go_on.set()
        return False

    assert run.copier.close(wait=True, stop=go_on)
    assert finished(run.remote) == [1]
    (line, *_) = [line for line in run.said if "about" in line]
    what = "copying the checkpoint of step 1 to the mirror: 23.8 kB of 23.8 kB, about 0 s left"
    assert line == what


@pytest.mark.parametrize("waits", [False, True])
def test_the_end_of_a_job_waits_for_nothing(server: Server, run: Run, waits: bool) -> None:
    blocked = Blocks(server, ".distcp")
    run.save(1)
    assert blocked.came.wait(30)
    assert not run.copier.close(wait=waits, stop=lambda: True)
    assert run.said == ["checkpoint of step 1 is not in the mirror: the run did not wait"]
    run.save(2)  # nobody takes it any more
    blocked.go_on.set()
    until(run.is_idle)
    assert finished(run.remote) == [] and not run.warned and len(run.said) == 1


def test_a_stalled_server_does_not_hold_up_the_end(
    server: Server, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copiers, "STALLED_SECONDS", 0.5)
    blocked = Blocks(server, ".distcp")
    run.save(1)
    assert blocked.came.wait(30)
    assert not run.finish()
    assert run.warned == ["the mirror has not taken a byte for 0 s"]
    blocked.go_on.set()


def test_the_end_tries_once_more_what_has_failed(server: Server, run: Run) -> None:
    server.on_request = lambda method, path: path.endswith(".distcp")
    run.save(1)
    until(lambda: bool(run.warned) and run.is_idle())
    server.on_request = lambda method, path: None
    assert run.finish() and finished(run.remote) == [1]


def test_what_is_broken_or_gone_is_not_copied(run: Run) -> None:
    damaged, removed, whole = (saved(run.folder, step) for step in (1, 2, 3))
    stores.flip(damaged.path / "__0_0.distcp", 99)
    run.copier.offer(damaged)
    until(lambda: len(run.warned) == 1)
    assert run.warned[0].endswith("is not what its manifest lists, and was not copied")
    until(run.is_idle)
    shutil.rmtree(removed.path)
    run.copier.offer(removed)
    until(lambda: len(run.warned) == 2)
    assert run.warned[1].endswith("manifest.json was removed before it was copied")
    run.copier.offer(whole)
    assert run.finish() and finished(run.remote) == [3]


def test_it_is_pruned_like_the_folder(server: Server, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "checkpoint.keep=2", "checkpoint.keep_every=10")
    run.remote.write("step-00000009/__0_0.distcp", b"left over")
    run.remote.write("step-00000099/__0_0.distcp", b"of what a resume has passed over")
    run.remote.write(f"step-00000099/{MANIFEST}", b"it stays until it is written again")
    for step in (8, 10, 12, 14):
        run.save(step)
        until(run.is_idle)
    assert run.finish() and not run.warned
    assert sorted(run.remote.listing()) == [10, 12, 14, 99]
    assert run.remote.read(LATEST) == b"step-00000014\n"
    again = Run(tmp_path / "run")
    again.save(99)
    assert again.finish() and holds(again.remote, Store(run.folder).checkpoints()[-1])


def test_a_run_that_was_succeeded_copies_no_more(server: Server, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.save(1)
    until(run.is_idle)
    _forget_settings(run.label)
    other = Run(tmp_path / "other")  # the same settings, and a folder without checkpoints
    run.save(2)
    assert not run.finish()
    (line,) = run.warned
    assert f"was taken over by {tmp_path / 'other'} on " in line and "nothing more" in line
    assert finished(other.remote) == [1]


def _forget_settings(label: Label) -> None:
    """Checkpoints of these tests hold no settings of a run."""
    step = finished(label.remote)[-1]
    text = label.remote.read(RUN)
    label.remote.write(f"step-{step:08d}/state.json", text)


def _fetches(folder: Path, environment: dict[str, str]) -> list[str]:
    os.environ.update(environment)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    said: list[str] = []
    found = fetch_newest(URL, Store(folder), dist.group.WORLD, said.append)
    assert found is not None and found.step == 3
    found.verify()
    dist.barrier()
    return said


def test_two_ranks_fetch_one_checkpoint(server: Server, run: Run, tmp_path: Path) -> None:
    run.save(3)
    assert run.finish()
    said, nothing = world.run(2, _fetches, tmp_path / "fetched", server.environment)
    assert nothing == [] and len(said) == 2
    (found,) = Store(tmp_path / "fetched").checkpoints()
    (saved_one,) = Store(run.folder).checkpoints()
    assert holds(run.remote, found) and stores.holds(found, 3)
    assert {p.name for p in found.path.iterdir()} == {p.name for p in saved_one.path.iterdir()}
    assert sorted(p.name for p in found.path.parent.iterdir()) == [LATEST, found.path.name]


def _refused(server: Server, allowed: Callable[[str, str], bool]) -> None:
    server.on_request = lambda method, path: not allowed(method, path)


@pytest.mark.parametrize(
    ("url", "allowed", "what"),
    [
        (URL, lambda method, path: True, None),
        ("s3://no-such-bucket/a", lambda method, path: True, "bucket does not exist"),
        (URL, lambda method, path: method != "PUT", "cannot write s3://runs/runs/a/probe-"),
        (URL, lambda method, path: method != "DELETE", "cannot remove s3://runs/runs/a/probe-"),
    ],
    ids=["usable", "no bucket", "read only", "no removing"],
)
def test_a_bucket_is_tried_before_a_run_begins(
    server: Server, url: str, allowed: Callable[[str, str], bool], what: str | None
) -> None:
    _refused(server, allowed)
    if what is None:
        probe_mirror(config_of(url))
        assert Remote(url)._files.find(BUCKET) == []
        return
    with pytest.raises(UserError) as error:
        probe_mirror(config_of(url))
    text = str(error.value)
    assert text.startswith("checkpoint.mirror: cannot ") and what in text
    assert "the bucket must exist, and this user may list, read, write" in text
    assert "\n" not in text and "secret-of" not in text


def test_a_server_that_is_not_there(server: Server) -> None:
    server.stop()
    try:
        with pytest.raises(UserError, match=r"cannot list s3://runs/runs/a: Could not connect"):
            probe_mirror(config_of(URL))
    finally:
        server.start()
