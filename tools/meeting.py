"""Measures how long so many ranks take to find each other, and what they ask of the store.

    python tools/meeting.py --ranks 512 4096 [--json]

Each rank is a thread that starts as one of a run does: it meets the others in a real TCPStore and
begins to be watched over. The first rank, with the store, is a process of its own, and the others
share some more, a few in each, as the threads of a Python process hold each other up. What is
counted are the requests that the ranks make, by what they call, and the keys named in them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nlscale.cluster.life.open_files import raise_soft_limit
from nlscale.cluster.life.place import Place
from nlscale.cluster.life.rendezvous import meet_from
from nlscale.cluster.life.watch import Watch
from nlscale.config.keys import to_plain
from nlscale.config.vocabulary import Config, TimeoutsConfig

_RANKS_A_PROCESS = 64
_REQUESTS = (
    *("set", "get", "add", "check", "wait", "multi_get", "multi_set"),
    *("append", "compare_set", "delete_key", "num_keys"),
)
"""What asks the store for something."""
_SECONDS = 900.0
_STACK_BYTES = 512 * 1024
_counts = threading.local()
_FORK = multiprocessing.get_context("fork")  # what torch needs is imported once


class Counting(dist.PrefixStore):
    """A client that counts what its thread asks of it."""


def _counted(name: str) -> Any:
    plain = getattr(dist.PrefixStore, name)

    @functools.wraps(plain)
    def ask(self: Counting, *args: Any) -> Any:
        keys = len(args[0]) if args and isinstance(args[0], list) else 1
        _counts.requests[name] += 1
        _counts.keys += keys
        _counts.most_keys = max(_counts.most_keys, keys)
        return plain(self, *args)

    return ask


for _name in _REQUESTS:
    setattr(Counting, _name, _counted(_name))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[512], help="how many meet; one number or several"
    )
    parser.add_argument("--json", action="store_true", help="print an object of JSON, a line each")
    args = parser.parse_args()
    for ranks in args.ranks:
        found = measure(ranks)
        print(json.dumps(found) if args.json else report(found), flush=True)


def measure(ranks: int) -> dict[str, Any]:
    """Let them meet.

    Returns:
        `ranks`; `seconds` from the first that begins to the last that is watched; `requests`, by
        name; `keys`, named in all of them; `keys_of_a_rank`, the most that any rank but the first
        named in one request; `server_sockets`, those of the process of the first rank and the store
        in the end.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    edges = [0, *range(1, ranks, _RANKS_A_PROCESS), ranks]
    parts = [range(a, b) for a, b in itertools.pairwise(edges)]
    start, over = (_FORK.Barrier(len(parts)) for _ in range(2))
    said = _FORK.SimpleQueue()
    processes = [
        _FORK.Process(target=_take_part, args=(part, ranks, port, start, over, said))
        for part in parts
    ]
    for process in processes:
        process.start()
    found = [said.get() for _ in processes]
    for process in processes:
        process.join()
    if failed := [error for part in found for error in part["failed"]]:
        raise SystemExit(f"{len(failed)} ranks failed, the first with {failed[0]}")
    return {
        "ranks": ranks,
        "seconds": max(part["end"] for part in found) - min(part["begin"] for part in found),
        "requests": dict(sum((part["requests"] for part in found), Counter())),
        "keys": sum(part["keys"] for part in found),
        "keys_of_a_rank": max(part["most_keys"] for part in found if not part["first"]),
        "server_sockets": next(part["sockets"] for part in found if part["first"]),
    }


def _take_part(part: range, ranks: int, port: int, start: Any, over: Any, said: Any) -> None:
    """Be some of the ranks, in a process of their own."""
    raise_soft_limit()
    # torch asks the DNS for the name of whom it connects to, here for all ranks at one machine
    os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"
    threading.stack_size(_STACK_BYTES)
    dist.PrefixStore = Counting  # type: ignore[misc]
    found: dict[str, Any] = {"requests": Counter(), "keys": 0, "most_keys": 0, "failed": []}
    connected: list[Any] = []
    lock, told = threading.Lock(), to_plain(Config())

    def be(rank: int) -> None:
        _counts.requests, _counts.keys, _counts.most_keys = Counter(), 0, 0
        here = Place(rank, ranks, address="127.0.0.1", port=port)
        timeouts = TimeoutsConfig(startup=_SECONDS)
        try:
            meeting = meet_from(here, 0, _SECONDS, told)
            watch = Watch(meeting, timeouts, lambda reason: None)
        except Exception as error:
            found["failed"].append(f"rank {rank}: {error!r}")
            return
        with lock:
            connected.extend([meeting, watch])
            found["requests"] += _counts.requests
            found["keys"] += _counts.keys
            found["most_keys"] = max(found["most_keys"], _counts.most_keys)

    threads = [threading.Thread(target=be, args=(rank,)) for rank in part]
    start.wait()
    found["begin"] = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found["end"] = time.monotonic()
    found["first"] = 0 in part
    over.wait()
    found["sockets"] = _sockets()
    over.wait()
    said.put(found)
    over.wait()  # none lets go of its connections before
    os._exit(0)


def _sockets() -> int:
    files = Path("/proc/self/fd").iterdir()
    return sum(os.path.islink(file) and "socket:" in os.readlink(file) for file in files)


def report(found: dict[str, Any]) -> str:
    total = sum(found["requests"].values())
    by_name = ", ".join(f"{count:,} {name}" for name, count in sorted(found["requests"].items()))
    return (
        f"{found['ranks']:,} ranks met and are watched over after {found['seconds']:.1f} s\n"
        f"requests   {total:,}, {total / found['ranks']:.1f} a rank ({by_name})\n"
        f"keys       {found['keys']:,} in all; at most {found['keys_of_a_rank']:,} in a request of "
        f"a rank but the first\n"
        f"sockets    {found['server_sockets']:,} of the first rank, which has the store"
    )


if __name__ == "__main__":
    main()
