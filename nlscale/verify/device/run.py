"""`nlscale bench device`: part after part, until all are done or the minutes are over."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nlscale.cluster.life.last_words import last_words
from nlscale.cluster.life.owner import hold
from nlscale.errors import Stopped, UserError
from nlscale.verify.device.child import live
from nlscale.verify.device.goals import Judgement, Verdict, verdicts
from nlscale.verify.device.page import write_page
from nlscale.verify.device.parts import Part, named
from nlscale.verify.device.ranks import Ranks
from nlscale.verify.device.records import Folder, Record, State
from nlscale.verify.device.version import version

_POLL_SECONDS = 0.05
_ALONE = {"RANK": "0", "WORLD_SIZE": "1"}
"""The place of a process that does a part by itself."""
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
        if left and _FIRST not in failed:  # without which nothing else is begun
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
    records, begun = dict(before), False
    for number, part in enumerate(todo, start=1):
        left = until - time.monotonic()
        if part.about > left and begun and not tiny:
            say(f"{part.name}: not begun, about {part.about:.0f} s and {max(0, left):.0f} s left")
            continue
        if left <= 0:
            break
        begun = begun or part.name != _FIRST
        remaining = f"{left / 60:.1f} min left"
        say(f"{number} of {len(todo)}, {part.name}: {part.what} ({remaining})")
        limit = min(part.most, left)
        ranks.order({"part": part.name, "seconds": limit, "all": part.by_all})
        if part.name not in before or before[part.name].state != State.cut:
            shutil.rmtree(folder.scratch(part.name), ignore_errors=True)  # begun anew, not gone on
        record = _measure(ranks, folder, part, limit, tiny)
        if part.name == _FIRST and record.result is not None:
            folder.check_same(before.get(_FIRST), record.result)
        records[part.name] = record
        say(f"  {record.state.value} after {record.seconds:.0f} s: {record.says}")
        if part.name == _FIRST and record.result is None:
            break  # nothing is known of what would be measured, nor whether it is the same
        folder.write(record)
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
    mine = _run(ranks, folder, part, limit, tiny)
    others = ranks.outcomes() if part.by_all else []
    failed = [outcome for outcome in (mine, *others) if "error" in outcome]
    # a rank that only gave up for another's sake has no reason of its own
    reasons = [outcome for outcome in failed if not outcome.get("for_others")] or failed
    error = None
    if reasons:
        who = f"{reasons[0]['who']}: " if reasons[0] is not mine else ""
        error = who + reasons[0]["error"]
    if error is None:
        state = State.done
    elif reasons[0].get("over"):
        state = State.too_long if limit >= part.most else State.cut
    else:
        state = State.failed
    return Record(
        part=part.name,
        what=part.what,
        state=state,
        seconds=round(time.monotonic() - clock, 1),
        began=began.isoformat(timespec="seconds"),
        nlscale=version(),
        result=None if error else mine["result"],
        others=[] if error else [other["result"] for other in others],
        error=error,
    )


def _run(ranks: Ranks, folder: Folder, part: Part, limit: float, tiny: bool) -> dict[str, Any]:
    """A part on this rank: its `result`, or `error` and whether it was `over` its time."""
    place = ranks.together() if part.by_all else {}
    outcome = _alone(ranks, folder, part, limit, tiny, place or _ALONE)
    if part.by_all:
        ranks.tell(outcome)
    return outcome


def _alone(
    ranks: Ranks, folder: Folder, part: Part, limit: float, tiny: bool, place: dict[str, str]
) -> dict[str, Any]:
    """As `_run`, in a process at a place."""
    rank = ranks.here.rank
    scratch, log = folder.scratch(part.name), folder.log(part.name, rank)
    result = folder.parts / f".result-{part.name}.{rank}"
    try:
        folder.parts.mkdir(parents=True, exist_ok=True)
        log.touch()
        result.unlink(missing_ok=True)
    except OSError as error:
        return {"error": f"cannot write {error.filename}: {error.strerror}"}
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
    if over:
        return {"error": f"ended after {limit:.0f} s", "over": True}
    if process.exitcode == 0:
        found = json.loads(result.read_bytes())
        result.unlink()
        return {"result": found}
    if for_others:
        return {"error": "another rank has failed", "for_others": True}
    return {"error": last_words(log, process.exitcode or 0)}


def _end(process: Any) -> None:
    """With all that it has started, which is in its session, and may have outlived it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # one that has no session of its own yet
    process.join()
