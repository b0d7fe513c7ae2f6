"""A program: a shard crosses between two emulated nodes, whose links are counted; prints JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from levels.level_runs import load

from nlscale.bench.netns import EmulatedNodes, sent_bytes
from nlscale.bench.ranks import run_ranks
from nlscale.config.vocabulary import WireFormat
from nlscale.levels.spectrum import reduction_bytes
from nlscale.levels.wire import Wire
from nlscale.parallel.layout import process_groups

ELEMENTS = 2_000_003


def crossed() -> list[tuple[str, float, float, float]]:
    """Of each format: bytes that the link has sent, that the wire counts, and that are planned."""
    found = []
    with process_groups(load(["parallel.ranks_per_node=1"])) as layout:
        for format_ in (WireFormat.int8, WireFormat.int4):
            wire, shard = Wire(layout), torch.randn(ELEMENTS)
            packed = wire.packed(wire.owed([shard], format_), 0, format_, None)
            dist.barrier(group=layout.host)
            before = sent_bytes()
            wire.start(shard, format_, packed=packed)
            wire.finish()
            dist.barrier(group=layout.host)
            planned = reduction_bytes(ELEMENTS, layout.nodes, format_)
            found.append((format_.value, sent_bytes() - before, wire.bytes, planned))
    return found


if __name__ == "__main__":
    with EmulatedNodes(2, None) as nodes:
        print(json.dumps(run_ranks(nodes, 1, crossed)))
