"""Loss against inter-node bytes as JSON and as a person reads it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from nlscale.cluster.machines import Cluster
from nlscale.config.units import human_bytes
from nlscale.scaling.law.network import Sent
from nlscale.scaling.law.savings import LEVEL, Saving, by_setting, savings


def network_to_plain(runs: list[Sent], cluster: Cluster) -> dict[str, Any]:
    """What JSON says under the one key `network`.

    Keys:
        cluster, nodes: which.
        runs: fewest bytes first: run, family, periods, setting (its name, of all that decides
            bytes), approximate (the loss depends on the number of nodes), group, seed, n, tokens,
            loss, bytes_per_token, bytes (in the whole training) and efficient (no other run is as
            good for as few bytes).
        savings: of each setting beside the `reference`, over pairs of runs of equal size, tokens,
            data and seed: setting, periods, fewer (times fewer bytes), costs (a pair each, nats per
            token), loss (their mean), standard_error (of it; null of one pair), interval (of it,
            Student's, all together at 95%; null of fewer than 3 pairs), interval_level (of each by
            itself) and relative (mean and interval in percent of the loss of the reference).
    """
    return {
        "network": {
            "cluster": cluster.name,
            "nodes": cluster.nodes,
            "runs": [asdict(run) for run in runs],
            "savings": [_plain(saving) for saving in savings(runs)],
        }
    }


def print_network(runs: list[Sent], cluster: Cluster, console: Console) -> None:
    """Print what the settings save and cost, and how much is sent."""
    console.print(
        f"On {cluster.name} ({cluster.nodes} nodes) these runs would send "
        f"{human_bytes(min(run.bytes for run in runs))} to "
        f"{human_bytes(max(run.bytes for run in runs))} of gradients from a node; "
        f"{sum(run.efficient for run in runs)} of {len(runs)} have the least loss for their bytes"
    )
    found, (reference, *others) = savings(runs), by_setting(runs)
    if found:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        columns = ("periods of the levels", "fewer bytes", "loss", "", "relative", "", "pairs")
        for column in columns:
            table.add_column(column, justify="left" if column == columns[0] else "right")
        for s in found:
            table.add_row(
                s.setting,
                f"{s.fewer:.2f}x",
                f"{s.loss:+.4f}",
                _within(s.interval, "+.4f"),
                f"{s.percent.mean:+.2f}%",
                _within(s.relative_interval, "+.2f"),
                f"{len(s.costs)}",
            )
        console.print(f"Beside periods {reference}, at equal size and tokens:")
        console.print(table)
        if any(s.interval for s in found):
            console.print(
                f"In brackets Student's intervals over pairs by seed, all together at {LEVEL:.0%}"
            )
    paired = {s.setting for s in found}
    for setting in others:
        if setting not in paired:
            console.print(
                f"{setting} is not compared: it has no run of equal size, tokens, data and seed as "
                f"one of {reference}",
                soft_wrap=True,
            )
    approximate = list(dict.fromkeys(run.setting for run in runs if run.approximate))
    if approximate:
        console.print(
            f"Approximate, with the loss of as many nodes as they were trained on: "
            f"{'; '.join(map(repr, approximate))}",
            soft_wrap=True,
        )


def _plain(saving: Saving) -> dict[str, Any]:
    return {
        "setting": saving.setting,
        "periods": saving.periods,
        "reference": saving.reference,
        "fewer": saving.fewer,
        "costs": list(saving.costs),
        "loss": saving.loss,
        "standard_error": saving.standard_error,
        "interval": saving.interval and list(saving.interval),
        "interval_level": saving.nats.level,
        "relative": {
            "mean": saving.percent.mean,
            "interval": saving.relative_interval and list(saving.relative_interval),
        },
    }


def _within(interval: tuple[float, float] | None, form: str) -> str:
    return "" if interval is None else f"[{interval[0]:{form}}, {interval[1]:{form}}]"
