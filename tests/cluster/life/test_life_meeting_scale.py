"""What many ranks that meet ask of the store grows with their number, not with its square."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from nlscale.cluster.life.open_files import needed

TOOL = Path(__file__).parents[3] / "tools" / "meeting.py"


def test_requests_grow_with_the_ranks() -> None:
    argv = [sys.executable, str(TOOL), "--ranks", "32", "64", "--json"]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    for line, ranks in zip(ended.stdout.splitlines(), (32, 64), strict=True):
        found = json.loads(line)
        assert found["ranks"] == ranks
        polls = found["requests"].pop("check")  # those of who waits, the longer the more
        assert found["requests"] == {
            "add": 3 * ranks,  # its claim to the rank, its arrival, its first word
            "multi_set": ranks,
            "set": ranks + 2,  # its first word; the last to come says so, twice
            "compare_set": 2,  # the first rank's sign, and its verdict
            "get": 2 * (ranks - 1),
            "multi_get": 1,  # of the signs of all, by the first rank
        }
        lists = 2 * ranks - 1  # keys of the two requests in which the first asks for all signs
        others = 8 * ranks + 2 * (ranks - 1) + polls
        assert found["keys"] < others + lists + ranks
        assert found["keys_of_a_rank"] == 2
        assert 3 * ranks <= found["server_sockets"] < needed(ranks, store=True)
