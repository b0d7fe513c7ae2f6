"""`nlscale bench device`: part after part, until all are done or the minutes are over."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import nlscale
from nlscale.cluster.life.last_words import last_words
from nlscale.cluster.life.owner import hold
from nlscale.errors import Stopped, UserError
from nlscale.verify.device.child import live
from nlscale.verify.device.goals import Judgement, Verdict, verdicts
from nlscale.verify.device.page import write_page
from nlscale.verify.device.parts import Part, named
from nlscale.verify.device.ranks import Ranks
from nlscale.verify.device.records import Folder, Record, State

_POLL_SECONDS = 0.05
_FIRST = "device"
"""The part that says what is measured: done anew by each call."""


@dataclass(frozen=True)
class Report:
    """What lies in the folder after a call."""

    folder: Folder
    parts: list[Part]
    """That were asked for."""
    records: dict[str, Record]
    verdicts: list[Verdict]

    def check(self) -> None:
        """
        Raises:
            Stopped: the minutes were over before all was measured; the same command goes on.
            UserError: a part has failed, or a goal was missed.
        """
        ended = (State.done, State.failed, State.too_long)
        left = [part.name for part in self.parts if self._state(part) not in ended]
        failed = [p.name for p in self.parts if self._state(p) in (State.failed, State.too_long)]
        missed = [v.what for v in self.verdicts if v.judgement == Judgement.missed]
        if left:
            raise Stopped(
                f"the minutes are over: {len(left)} of {len(self.parts)} parts are not measured "
                f"yet ({', '.join(left)}); the same command goes on with them"
            )
        if failed:
            raise UserError(
                f"{len(failed)} of {len(self.parts)} parts failed ({', '.join(failed)}); their "
                f"logs are in {self.folder.parts}, and the same command tries them again"
            )
        if missed:
            raise UserError(f"{len(missed)} goals are missed: {'; '.join(missed)}")

    def _state(self, part: Part) -> State:
        record = self.records.get(part.name)
        return record.state if record is not None else State.not_begun


def accept(
    out: Path, minutes: float, only: Sequence[str] | None, tiny: bool, say: Callable[[str], None]
) -> Report | None:
    """Measure what is not measured yet.

    A part that fails, or takes too long, is said to have, and the next one is begun; the next call
    tries it again, when all others are done.

    Args:
        out: folder of the device; what it holds of an earlier call is not done again.
        minutes: after which nothing more is begun, and what is under way is ended.
        only: names of parts, or what they begin with; None: all.
        tiny: at sizes that any machine takes.
        say: takes lines of progress.

    Returns:
        What lies in the folder now; None on all ranks but the first.

    Raises:
        UserError: no such part, or the folder holds what another device has measured.
    """
    ranks = Ranks(tiny)
    chosen = named(only, ranks.here.world)
    if not ranks.first:
        _follow(ranks, Folder(out), tiny)
        return None
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}") from None
    with hold(out, "nlscale bench device", instead="another --out"):
        try:
            return _lead(ranks, Folder(out), chosen, 60 * minutes, tiny, say)
        finally:
            ranks.end()


def _lead(
    ranks: Ranks,
    folder: Folder,
    chosen: list[Part],
    seconds: float,
    tiny: bool,
    say: Callable[[str], None],
) -> Report:
    until = time.monotonic() + seconds
    before = folder.records()
    asked = {part.name: part for part in (*named([_FIRST], ranks.here.world), *chosen)}
    todo = _in_order(list(asked.values()), before)
    say(_outlook(todo, len(asked), seconds, tiny))
    records = dict(before)
    for number, part in enumerate(todo, start=1):
        left = until - time.monotonic()
        if part.about > left and not tiny:
            say(f"{part.name}: not begun, about {part.about:.0f} s and {max(0, left):.0f} s left")
            continue
        if left <= 0:
            break
        remaining = f"{left / 60:.1f} min left"
        say(f"{number} of {len(todo)}, {part.name}: {part.what} ({remaining})")
        limit = min(part.most, left)
        ranks.order({"part": part.name, "seconds": limit, "all": part.by_all})
        began = time.monotonic()
        record = _measure(ranks, folder, part, limit, tiny)
        if part.name == _FIRST and record.result is not None:
            folder.check_same(before.get(_FIRST), record.result)
        folder.write(record)
        records[part.name] = record
        say(f"  {record.state.value} after {time.monotonic() - began:.0f} s: {record.says}")
        if part.name == _FIRST and record.result is None:
            break  # nothing is known of what would be measured
        write_page(folder, records, verdicts(records))
    return Report(folder, list(asked.values()), records, verdicts(records))


def _in_order(asked: list[Part], before: Mapping[str, Record]) -> list[Part]:
    """What is to be done: first what says where, then what was never tried, then what failed."""
    state = {part.name: before[part.name].state for part in asked if part.name in before}
    again = (State.failed, State.too_long)
    todo = [p for p in asked if p.name == _FIRST or state.get(p.name) != State.done]
    return sorted(todo, key=lambda p: p.name != _FIRST and state.get(p.name) in again)


def _outlook(todo: list[Part], asked: int, seconds: float, tiny: bool) -> str:
    minutes = sum(part.about for part in todo) / 60
    about = " at tiny sizes" if tiny else f", about {minutes:.0f} min on a GPU"
    done = asked - len(todo)
    before = f", {done} done before" if done else ""
    return f"{len(todo)} parts{about}{before}; {seconds / 60:g} min for this call"


def _follow(ranks: Ranks, folder: Folder, tiny: bool) -> None:
    """Do what the first rank says, until it says that this was all."""
    parts = {part.name: part for part in named(None, ranks.here.world)}
    while "end" not in (order := ranks.next_order()):
        if order["all"]:
            _run(ranks, folder, parts[order["part"]], order["seconds"], tiny)


def _measure(ranks: Ranks, folder: Folder, part: Part, limit: float, tiny: bool) -> Record:
    began, clock = datetime.now(timezone.utc), time.monotonic()
    outcome = _run(ranks, folder, part, limit, tiny)
    others = ranks.outcomes() if part.by_all else []
    error = outcome.get("error")
    for other in others:
        # a rank that only gave up for another's sake has no reason of its own
        if other.get("error") and (not error or outcome.get("for_others")):
            error = f"{other['who']}: {other['error']}"
    if error is None:
        state = State.done
    elif outcome.get("over"):
        state = State.too_long if limit >= part.most else State.cut
    else:
        state = State.failed
    return Record(
        part=part.name,
        what=part.what,
        state=state,
        seconds=round(time.monotonic() - clock, 1),
        began=began.isoformat(timespec="seconds"),
        nlscale=_version(),
        result=None if error else outcome["result"],
        others=[] if error else [other["result"] for other in others],
        error=error,
    )


def _run(ranks: Ranks, folder: Folder, part: Part, limit: float, tiny: bool) -> dict[str, Any]:
    """A part on this rank: its `result`, or `error` and whether it was `over` its time."""
    rank = ranks.here.rank
    scratch, log = folder.scratch(part.name), folder.log(part.name, rank)
    folder.parts.mkdir(parents=True, exist_ok=True)
    result = folder.parts / f".result-{part.name}.{rank}"
    result.unlink(missing_ok=True)
    place = ranks.together() if part.by_all else {}
    place = place or {"RANK": "0", "WORLD_SIZE": "1"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nlscale.train.preload"])
    process = context.Process(target=live, args=(part, scratch, tiny, place, log, result))
    process.start()
    until, for_others = time.monotonic() + limit, False
    try:
        while process.is_alive() and time.monotonic() < until and not for_others:
            process.join(_POLL_SECONDS)
            for_others = part.by_all and ranks.give_up()
        over = process.is_alive() and not for_others
    finally:
        _end(process)
    outcome: dict[str, Any] = {}
    if over:
        outcome = {"error": f"ended after {limit:.0f} s", "over": True}
    elif process.exitcode == 0:
        outcome = {"result": json.loads(result.read_bytes())}
    elif for_others:
        outcome = {"error": "another rank has failed", "for_others": True}
    else:
        outcome = {"error": last_words(log, process.exitcode or 0)}
    result.unlink(missing_ok=True)
    if part.by_all:
        ranks.tell(outcome)
    return outcome


def _end(process: Any) -> None:
    """With all that it has started, which is in its session."""
    if process.is_alive():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # one that has no session of its own yet
    process.join()


def _version() -> str:
    """Of nlscale, with the commit where it is run from a checkout, and + where that was changed."""
    checkout = Path(nlscale.__file__).parents[1]
    said = []
    for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "nlscale"]):
        try:
            ran = subprocess.run(
                ["git", "-C", str(checkout), *words], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return nlscale.__version__
        said.append(ran.stdout.strip())
    return f"{nlscale.__version__} at {said[0]}{'+' if said[1] else ''}"
