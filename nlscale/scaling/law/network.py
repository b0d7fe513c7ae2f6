"""Loss against what a training sends between nodes, from finished runs.

A level's gradient crosses the network once a period, and that is the same training as reducing it
at every step (docs/concepts/levels.md). So a run on one GPU has the loss that any cluster would
have reached, and what that cluster would have sent follows from its configuration alone.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from nlscale.cluster.machines import Cluster
from nlscale.config import recipe
from nlscale.config.curriculum import total_tokens
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.levels.spectrum import levels_of
from nlscale.model.sizes import level_parameters, tables
from nlscale.plan import traffic
from nlscale.scaling.law.points import MEASURED, PERIODS, RUN, Points, Row

_APART = ("levels.spectrum", "run.", "checkpoint.", "resume.", "wandb.", "parallel.")
"""Keys in which runs may differ and yet be alike but for their periods (and seed)."""


@dataclass(frozen=True)
class Sent:
    """What a run would send on a cluster, and what it learned.

    Attributes:
        run: its folder.
        family: its value of the column that families are told apart by; empty without one.
        periods: of its levels, in steps ("1, 4, 16").
        group: a number; runs of one group differ in their periods and seed alone.
        n, tokens, loss: parameters, tokens, nats per token.
        bytes_per_token: of gradients, leaving one node.
        bytes: the same over the training.
        efficient: whether no other run has a loss as low for as few bytes.
    """

    run: str
    family: str
    periods: str
    group: int
    n: float
    tokens: float
    loss: float
    bytes_per_token: float
    bytes: float
    efficient: bool


@dataclass(frozen=True)
class Saving:
    """What other periods save and cost beside those that send most, at equal size and tokens.

    Attributes:
        periods: of the levels, in steps; `reference`: those it is compared with.
        fewer: bytes of the reference over bytes, geometric mean over the pairs.
        costs: nats per token above the reference, of each size and length trained with both.
    """

    periods: str
    reference: str
    fewer: float
    costs: tuple[float, ...]

    @property
    def loss(self) -> float:
        """The mean cost, nats per token."""
        return statistics.fmean(self.costs)

    @property
    def standard_error(self) -> float | None:
        """Of the mean cost; None from one pair."""
        count = len(self.costs)
        return statistics.stdev(self.costs) / count**0.5 if count > 1 else None


def sent_on(points: Points, cluster: Cluster, by: str | None = None) -> list[Sent]:
    """What each run would send on the cluster, fewest bytes first.

    Args:
        points: of runs, whose folders hold their configurations.
        cluster: more than one node.
        by: a column whose values are the families.

    Raises:
        UserError: points of a CSV file, a cluster of one node, or a configuration that cannot be
            read or spread over it.
    """
    if cluster.nodes < 2:
        raise UserError(f"--frontier: {cluster.name} is one node, nothing crosses the network")
    if not all(RUN in row for row in points.rows):
        raise UserError(
            f"--frontier: {points.source} does not say how its runs are configured; give folders "
            f"of runs"
        )
    kinds = dict.fromkeys(map(_all_but_periods, points.rows))
    groups = {kind: number for number, kind in enumerate(kinds)}
    runs = []
    for row, n, tokens, loss in zip(points.rows, points.n, points.d, points.loss, strict=True):
        each = _bytes_per_token(row, cluster)
        runs.append((each * float(tokens), float(loss), float(n), float(tokens), each, row))
    runs.sort(key=lambda run: run[:2])
    found: list[Sent] = []
    best = float("inf")
    for total, loss, n, tokens, each, row in runs:
        found.append(
            Sent(
                run=row[RUN],
                family=row.get(by, "") if by else "",
                periods=row[PERIODS],
                group=groups[_all_but_periods(row)],
                n=n,
                tokens=tokens,
                loss=loss,
                bytes_per_token=each,
                bytes=total,
                efficient=loss < best,
            )
        )
        best = min(best, loss)
    return found


def alike(runs: list[Sent]) -> list[list[Sent]]:
    """The runs by their group, in each fewest bytes first."""
    groups: dict[int, list[Sent]] = {}
    for run in sorted(runs, key=lambda run: run.bytes):
        groups.setdefault(run.group, []).append(run)
    return list(groups.values())


def savings(runs: list[Sent]) -> list[Saving]:
    """Each setting of the periods beside the one that sends most a token and parameter."""
    settings = by_period(runs)
    reference, *others = settings
    found = []
    for periods in others:
        pairs = [
            (a, b)
            for group in alike(runs)
            if (a := [run for run in group if run.periods == reference])
            and (b := [run for run in group if run.periods == periods])
        ]
        if not pairs:
            continue
        fewer = statistics.geometric_mean(a[0].bytes / b[0].bytes for a, b in pairs)
        # several runs of one group differ by their seed
        costs = tuple(_mean_loss(b) - _mean_loss(a) for a, b in pairs)
        found.append(Saving(periods, reference, fewer, costs))
    return found


def by_period(runs: list[Sent]) -> list[str]:
    """The settings of the periods among the runs, that which sends most first."""
    shares: dict[str, list[float]] = {}
    for run in runs:
        shares.setdefault(run.periods, []).append(math.log(run.bytes_per_token / run.n))
    return sorted(shares, key=lambda periods: -statistics.fmean(shares[periods]))


def _all_but_periods(row: Row) -> tuple[tuple[str, str], ...]:
    return tuple(
        (key, value)
        for key, value in row.items()
        if key not in MEASURED and not key.startswith(_APART)
    )


def _mean_loss(runs: list[Sent]) -> float:
    return statistics.fmean(run.loss for run in runs)


def _bytes_per_token(row: Row, cluster: Cluster) -> float:
    config = recipe.load(Path(row[RUN]) / "config.yaml").config
    if PERIODS not in row:
        raise UserError(f"--frontier: {row[RUN]}: its summary.json has no levels")
    parallel = config.parallel
    group_nodes = cluster.nodes_of_a_data_group(parallel.tensor, parallel.pipeline)
    sent = traffic(
        config,
        levels_of(config),
        _vocabulary(row, config),
        cluster.nodes,
        group_nodes=group_nodes,
    )
    return sent.mean / (total_tokens(config) / config.train.steps)


def _vocabulary(row: Row, config: Config) -> int:
    """What the run's model had, which its configuration may have left to data that are gone."""
    rest = float(row["N"]) - sum(level_parameters(config, vocabulary=0))
    count, left = divmod(rest, tables(config) * config.model.d_model)
    if left or count < 1:
        raise UserError(
            f"--frontier: {row[RUN]}: summary.json counts {row['N']} parameters, which its "
            f"config.yaml does not give with any vocabulary"
        )
    return int(count)
