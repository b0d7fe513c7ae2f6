"""A lost or hung rank ends the run on all ranks, and one of them says which, where and in what.

A killed process is noticed by those connected to it at once; one that hangs, is stopped, or whose
network is gone is noticed by nobody: everyone waits in the next collective. So each rank says
every second, through the store of the rendezvous, what it is doing; when nothing is heard of one,
when a part of a step takes too long, or when a collective fails, what they said last tells who is
to blame.

The network may be gone too. So one thread talks to the store, and may wait there for ever, while
another looks at the clock.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch.distributed as dist

from nlscale.cluster.life.rendezvous import ENDING, Rendezvous, arrive, name_ranks, wait_for
from nlscale.config.vocabulary import TimeoutsConfig
from nlscale.errors import LostRank, SaidElsewhere, UserError

_BEAT_SECONDS = 1.0
_EXAMINATION_SECONDS = 3.5
"""Between two looks at what the ranks say, after which one that is alive has said something new."""
_LEAVE_SECONDS = 10.0
"""What a rank has to end by itself once another has said why the run ends."""
_LINGER_SECONDS = 15.0
"""For which the first rank, which may hold the store, waits at most for the others to hear why."""
_RESUMES = "the same command goes on from the last checkpoint"


@dataclass
class _Part:
    """What a thread of this rank is doing."""

    what: str
    since: float
    limit: float


@dataclass(frozen=True)
class _Word:
    """What a rank said last: how often it has spoken, and what it was doing for how long."""

    count: int
    step: int
    what: str
    seconds: float
    finished: bool = False


@dataclass
class _Now:
    """What this process is doing; it takes part in one run at a time."""

    step: int = 0
    steps_begun: int = 0
    parts: dict[int, list[_Part]] = field(default_factory=dict)
    timeouts: TimeoutsConfig = field(default_factory=TimeoutsConfig)


_now = _Now()


@contextmanager
def doing(what: str, checkpoint: bool = False) -> Iterator[None]:
    """Say what this thread is about to do, such as a collective, for as long as the body runs.

    Its time is limited by timeouts.step (timeouts.startup until the first step of this start is
    over), or by timeouts.checkpoint.
    """
    limits = _now.timeouts
    limit = limits.step if _now.steps_begun > 1 else max(limits.startup, limits.step)
    part = _Part(what, time.monotonic(), limits.checkpoint if checkpoint else limit)
    stack = _now.parts.setdefault(threading.get_native_id(), [])
    stack.append(part)
    try:
        yield
    finally:
        stack.remove(part)


def begin_step(step: int) -> None:
    """Say that this step begins."""
    _now.step = step
    _now.steps_begun += 1


class Watch:
    """Watches over the ranks of a run, from threads, while it is entered.

    A run ends with one reason, given by one rank: see `telling`.

    Args:
        meeting: the ranks.
        timeouts: of the configuration.
        on_end: takes the reason where a thread ends the process, just before.
        goes_on: says of a rank that was lost what to do then.
        steps: whether the run consists of steps, which are told by number.
    """

    def __init__(
        self,
        meeting: Rendezvous,
        timeouts: TimeoutsConfig,
        on_end: Callable[[str], None],
        goes_on: str = _RESUMES,
        steps: bool = True,
    ) -> None:
        self._place, self._rank, self._hosts = meeting.place, meeting.place.rank, meeting.hosts
        self._silence, self._on_end = timeouts.silence, on_end
        self._goes_on, self._steps = goes_on, steps
        self._store, self._asking = meeting.another_client(), meeting.another_client()
        self._count = 0
        self._over = threading.Event()
        self._contact = time.monotonic()
        self._heard: dict[int, tuple[int, float]] = {}
        self._silent: list[int] = []
        self._gone: list[int] = []
        self._said: SaidElsewhere | None = None
        self._said_at = 0.0
        _now.step, _now.steps_begun, _now.timeouts = 0, 0, timeouts
        self._speak(self._store)
        self._wait_for_words(timeouts.startup)

    def __enter__(self) -> Watch:
        for work in (self._talk, self._look_at_the_clock):
            threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        if kind is None:
            _within(_EXAMINATION_SECONDS, lambda: self._speak(self._asking, finished=True))

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the others why the body failed.

        Raises:
            LostRank: the body's error is the echo of a rank that was lost; this rank says so.
            SaidElsewhere: another rank says why the run ends.
        """
        try:
            yield
        except BaseException as error:
            instead: UserError | None = None
            if isinstance(error, RuntimeError) or (isinstance(error, UserError) and error.echo):
                instead = self._explain()
            instead = instead or self._tell(error)
            if self._rank == 0:
                _within(_LINGER_SECONDS, self._wait_until_heard)
            self._over.set()
            if instead is not None:
                raise instead from None
            if isinstance(error, UserError):
                error.told = True
            raise

    def _wait_for_words(self, seconds: float) -> None:
        """Until every rank has spoken: from here on all their words can be asked for together."""
        ranks = len(self._hosts)
        arrive(self._store, "speaking", ranks, "all speak")
        if not wait_for(self._store, "all speak", ranks, time.monotonic() + seconds):
            mute = [r for r in range(ranks) if not self._store.check([_word_of(r)])]
            raise LostRank(
                f"lost {name_ranks(mute)}: nothing heard for {seconds:g} s since all ranks had "
                f"met; {self._goes_on}"
            )

    def _explain(self) -> UserError | None:
        """What really made a collective of this rank fail; None: the failure is its own."""
        found: list[UserError] = []

        def examine() -> None:
            before = self._words(self._asking)
            until = time.monotonic() + _EXAMINATION_SECONDS
            while time.monotonic() < until:
                if said := self._said or self._ending(self._asking):
                    found.append(said)
                    return
                time.sleep(0.2)
            after = self._words(self._asking)
            silent = [r for r, word in after.items() if before[r] == word and not word.finished]
            if silent:
                self._gone = silent
                message = self._lost(silent, _EXAMINATION_SECONDS, after)
                found.append(self._claim(message, LostRank.exit_code) or LostRank(message))

        if not _within(3 * _EXAMINATION_SECONDS, examine):
            return self._said or self._cut_off()
        return found[0] if found else None

    def _tell(self, error: BaseException) -> SaidElsewhere | None:
        """Tell the others why this rank ends; what to raise instead if another has told already."""
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        said: list[SaidElsewhere | None] = []
        code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
        _within(_EXAMINATION_SECONDS, lambda: said.append(self._claim(message, code)))
        return said[0] if said else self._said

    def _claim(self, message: str, exit_code: int) -> SaidElsewhere | None:
        """Be the rank that says why the run ends, or get what another one said."""
        mine = {"rank": self._rank, "message": message, "exit_code": exit_code}
        mine["lost"] = self._gone
        winner = json.loads(self._asking.compare_set(ENDING, "", json.dumps(mine)))
        said = self._hear(winner, self._asking)
        return None if winner["rank"] == self._rank else said

    def _talk(self) -> None:
        while not self._over.wait(_BEAT_SECONDS):
            try:
                self._speak(self._store)
                self._listen()
                if self._said is None:
                    self._ending(self._store)
            except (dist.DistError, RuntimeError):
                continue  # the clock runs on
            self._contact = time.monotonic()

    def _speak(self, store: dist.Store, finished: bool = False) -> None:
        self._count += 1
        parts = list(_now.parts.get(threading.main_thread().native_id or 0, []))
        what = parts[-1].what if parts else "nothing that waits"
        seconds = time.monotonic() - parts[-1].since if parts else 0.0
        word = _Word(self._count, _now.step, what, seconds, finished)
        store.set(_word_of(self._rank), json.dumps(asdict(word)))

    def _listen(self) -> None:
        # The first rank listens to all, the others to the first: else they would ask for the
        # square of the ranks each second.
        now, ages = time.monotonic(), {}
        for rank, word in self._words(self._store, None if self._rank == 0 else [0]).items():
            count, since = self._heard.get(rank, (-1, now))
            if count != word.count:
                since = now
            self._heard[rank] = (word.count, since)
            if not word.finished:
                ages[rank] = now - since
        if max(ages.values(), default=0.0) > self._silence:
            # with those that have fallen silent at about the same time: the ranks of one node
            self._silent = [r for r, age in ages.items() if age > self._silence - 3 * _BEAT_SECONDS]

    def _look_at_the_clock(self) -> None:
        while not self._over.wait(_BEAT_SECONDS / 2):
            now = time.monotonic()
            parts = [part for stack in list(_now.parts.values()) for part in list(stack)]
            late = [part.limit for part in parts if now - part.since > part.limit]
            if self._said is not None:
                if now - self._said_at > _LEAVE_SECONDS:
                    self._exit(self._said)
            elif now - self._contact > self._silence + 2 * _BEAT_SECONDS:
                self._exit(self._cut_off())
            elif self._silent:
                self._gone = list(self._silent)
                self._exit(self._judge(partial(self._lost, self._gone, self._silence)))
            elif late:
                self._exit(self._judge(partial(self._hung, late[0])))

    def _judge(self, message: Callable[[dict[int, _Word]], str]) -> UserError:
        found: list[UserError] = []

        def examine() -> None:
            text = message(self._words(self._asking))
            found.append(self._claim(text, LostRank.exit_code) or LostRank(text))

        well = _within(_EXAMINATION_SECONDS, examine)
        return found[0] if well else self._said or self._cut_off()

    def _exit(self, reason: UserError) -> None:
        """End this process from a thread: its main thread waits for what will not come."""
        if isinstance(reason, LostRank):
            print(f"nlscale: {reason}", file=sys.stderr, flush=True)
            self._on_end(str(reason))
        if self._rank == 0:
            _within(_LINGER_SECONDS, self._wait_until_heard)
        os._exit(reason.exit_code)

    def _lost(self, ranks: list[int], seconds: float, words: dict[int, _Word]) -> str:
        what = "; ".join(
            f"rank {r} on {self._hosts[r]}, last heard in {self._part(words[r])}" for r in ranks[:8]
        )
        others = [word.what for rank, word in words.items() if rank not in ranks]
        if others:
            what += f", while others were in {Counter(others).most_common(1)[0][0]!r}"
        return (
            f"lost {name_ranks(ranks)}: nothing heard for {seconds:g} s ({what}). Killed (out of "
            f"memory? the node's log says), stopped, or cut off by the network; {self._goes_on}"
        )

    def _part(self, word: _Word) -> str:
        return f"{word.what!r} of step {word.step}" if self._steps else f"{word.what!r}"

    def _hung(self, limit: float, words: dict[int, _Word]) -> str:
        """Blame who has been longest in another part than most."""
        common = Counter((word.step, word.what) for word in words.values()).most_common(1)[0][0]
        apart = [rank for rank, word in words.items() if (word.step, word.what) != common]
        if not apart:
            step, what = common
            return (
                f"step {step} hangs: all ranks have been in {what!r} for {limit:g} s; look at the "
                f"network between {', '.join(sorted(set(self._hosts)))}, or raise timeouts"
            )
        rank = max(apart, key=lambda r: words[r].seconds)
        word = words[rank]
        return (
            f"rank {rank} on {self._hosts[rank]} hangs: {word.seconds:.0f} s in {word.what!r} of "
            f"step {word.step}, while the others are in {common[1]!r} of step {common[0]}; the "
            f"limit of {limit:g} s is set by timeouts; {self._goes_on}"
        )

    def _cut_off(self) -> UserError:
        """The store is out of reach; the last rank of each node says so.

        The first rank of the first node may be what was lost, so it is not left to a first one.
        """
        step = f" (step {_now.step})" if self._steps else ""
        message = (
            f"{self._place.who} cannot reach {self._place.meeting_point}: rank 0 on "
            f"{self._hosts[0]} was lost, or the network to it is down{step}; {self._goes_on}"
        )
        if self._place.local_rank == self._place.local_world - 1:
            return LostRank(message)
        return SaidElsewhere(message, LostRank.exit_code)

    def _words(self, store: dist.Store, ranks: list[int] | None = None) -> dict[int, _Word]:
        wanted = list(range(len(self._hosts))) if ranks is None else ranks
        values = store.multi_get([_word_of(rank) for rank in wanted])
        return {r: _Word(**json.loads(value)) for r, value in zip(wanted, values, strict=True)}

    def _ending(self, store: dist.Store) -> SaidElsewhere | None:
        """What the rank that ends the run has said, if one has."""
        if not store.check([ENDING]):
            return None
        return self._hear(json.loads(store.get(ENDING)), store)

    def _hear(self, ending: dict[str, Any], store: dist.Store) -> SaidElsewhere:
        said = SaidElsewhere(ending["message"], ending["exit_code"])
        self._gone = ending["lost"]
        if ending["rank"] != self._rank and self._said is None:
            self._said_at, self._said = time.monotonic(), said
        # Only now: the first rank, and with it the store, may go as soon as all have heard.
        store.set(_heard_by(self._rank), "")
        return said

    def _wait_until_heard(self) -> None:
        others = [r for r in range(1, len(self._hosts)) if r not in self._gone]
        while not self._asking.check([_heard_by(rank) for rank in others]):
            time.sleep(0.1)


def _word_of(rank: int) -> str:
    return f"word/{rank}"


def _heard_by(rank: int) -> str:
    return f"heard/{rank}"


def _within(seconds: float, work: Callable[[], object]) -> bool:
    """Whether `work` ended well in that time; where the store is gone it may never end."""
    well = threading.Event()

    def run() -> None:
        try:
            work()
        except (dist.DistError, RuntimeError):
            return
        well.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return well.is_set()
