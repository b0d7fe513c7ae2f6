"""Loss against inter-node bytes as JSON and as a person reads it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from nlscale.cluster.machines import Cluster
from nlscale.config.units import human_bytes
from nlscale.scaling.law.network import Sent, savings


def network_to_plain(runs: list[Sent], cluster: Cluster) -> dict[str, Any]:
    """What JSON says under the one key `network`.

    Keys:
        cluster, nodes: which.
        runs: fewest bytes first: run, family, periods, n, tokens, loss, bytes_per_token, bytes (in
            the whole training) and efficient (no other run is as good for as few bytes).
        savings: of each setting of the periods beside the `reference`, over pairs of runs of equal
            size and tokens: fewer (times fewer bytes), costs (a pair each, nats per token), loss
            (their mean) and standard_error (of it; null of one pair).
    """
    saved = [
        asdict(s) | {"loss": s.loss, "standard_error": s.standard_error} for s in savings(runs)
    ]
    return {
        "network": {
            "cluster": cluster.name,
            "nodes": cluster.nodes,
            "runs": [asdict(run) for run in runs],
            "savings": saved,
        }
    }


def print_network(runs: list[Sent], cluster: Cluster, console: Console) -> None:
    """Print what the periods save and cost, and how much is sent."""
    console.print(
        f"On {cluster.name} ({cluster.nodes} nodes) these runs would send "
        f"{human_bytes(min(run.bytes for run in runs))} to "
        f"{human_bytes(max(run.bytes for run in runs))} of gradients from a node; "
        f"{sum(run.efficient for run in runs)} of {len(runs)} have the least loss for their bytes"
    )
    found = savings(runs)
    if not found:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ("periods of the levels", "fewer bytes", "loss", "standard error", "pairs")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for s in found:
        error = "" if s.standard_error is None else f"{s.standard_error:.4f}"
        table.add_row(s.periods, f"{s.fewer:.2f}x", f"{s.loss:+.4f}", error, f"{len(s.costs)}")
    console.print(f"Beside periods {found[0].reference}, at equal size and tokens:")
    console.print(table)
