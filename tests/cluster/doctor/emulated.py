"""`nlscale doctor --nodes` on emulated nodes: a process of its own, which only imports and forks.

python emulated.py '{"nodes": 2, "ranks_per_node": 2, "rate": "200mbit", "arguments": [...]}'

`slow`: {node: rate} limits a node more than the others, `unset`: variables that no rank has.
Prints what the first rank prints, and exits as it does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch  # noqa: F401  imported once, before ranks are forked
from doctors import Ended, run

from nlscale.bench.netns import LINK, EmulatedNodes
from nlscale.bench.ranks import run_ranks


def main(asked: dict[str, Any]) -> int:
    def work() -> Ended:
        for name in asked.get("unset", []):
            os.environ.pop(name, None)
        node = int(os.environ["RANK"]) // asked["ranks_per_node"]
        rate = asked.get("slow", {}).get(str(node))
        if rate is not None:
            limit = ["tbf", "rate", rate, "burst", "128kb", "limit", "16mb"]
            subprocess.run(["tc", "qdisc", "replace", "dev", LINK, "root", *limit], check=True)
        return run("--nodes", "--json", *asked["arguments"])

    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    with EmulatedNodes(asked["nodes"], asked["rate"]) as nodes:
        ended = run_ranks(nodes, asked["ranks_per_node"], work)
    codes = {code for code, _, _ in ended}
    assert len(codes) == 1, ended
    print(ended[0][1])
    return codes.pop()


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
