"""Loss against what a training sends between nodes, from finished runs.

A level's gradient crosses the network once a period, and that is the same training as reducing it
at every step (docs/concepts/levels.md). So a run on one GPU has the loss that any cluster would
have reached, and what that cluster would have sent follows from its configuration alone, by the
count that a plan makes of it. Levels that cross rounded, and local ones, depend on the number of
nodes: their loss is that of as many as they were trained on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nlscale.cluster.machines import Cluster
from nlscale.config import recipe
from nlscale.config.curriculum import total_tokens
from nlscale.config.vocabulary import Config, Purpose
from nlscale.errors import UserError
from nlscale.levels.notes import approximate
from nlscale.levels.spectrum import Level, levels_of
from nlscale.model.sizes import level_parameters, tables
from nlscale.plan import traffic
from nlscale.scaling.law.points import MEASURED, PERIODS, RUN, Points, Row
from nlscale.scaling.law.setting import setting_of

_APART = (
    "levels.spectrum", "levels.period_warmup.", "levels.reduction", "levels.stagger",
    "levels.phases", "run.", "checkpoint.", "resume.", "wandb.", "parallel.",
)  # fmt: skip
"""Keys in which runs may differ and yet be alike but for their setting (and seed)."""
_SEED, _PURPOSE, _RATE = "run.seed", "run.purpose", "optimizer.learning_rate"


@dataclass(frozen=True)
class Sent:
    """What a run would send on a cluster, and what it learned.

    Attributes:
        run: its folder.
        family: its value of the column that families are told apart by; empty without one.
        periods: of its levels, in steps ("1, 4, 16").
        setting: these, and all else of its levels that decides bytes ("1, 4, 16 int8").
        approximate: whether its loss depends on the number of nodes.
        group: a number; runs of one group differ in their setting and seed alone, and in a
            learning rate that was chosen for the setting.
        seed: `run.seed`, which pairs runs of a group.
        n, tokens, loss: parameters, tokens, nats per token.
        bytes_per_token: of gradients, leaving one node.
        bytes: the same over the training.
        efficient: whether no other run has a loss as low for as few bytes.
    """

    run: str
    family: str
    periods: str
    setting: str
    approximate: bool
    group: int
    seed: str
    n: float
    tokens: float
    loss: float
    bytes_per_token: float
    bytes: float
    efficient: bool


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
    measured = [
        (row, float(n), float(tokens), float(loss))
        for row, n, tokens, loss in zip(points.rows, points.n, points.d, points.loss, strict=True)
        if row.get(_PURPOSE) != Purpose.search.value
    ]
    if not measured:
        raise UserError(f"--frontier: {points.source} are all of a search, which chooses a setting")
    runs = []
    for row, n, tokens, loss in measured:
        config, levels = _levels(row)
        each = _bytes_per_token(row, config, levels, cluster)
        runs.append((each * tokens, loss, n, tokens, each, row, setting_of(config, levels), levels))
    groups = _groups((run[5], run[6]) for run in runs)
    runs.sort(key=lambda run: run[:2])
    found: list[Sent] = []
    best = float("inf")
    for total, loss, n, tokens, each, row, setting, levels in runs:
        found.append(
            Sent(
                run=row[RUN],
                family=row.get(by, "") if by else "",
                periods=row[PERIODS],
                setting=setting,
                approximate=bool(approximate(levels, crosses=True)),
                group=groups[row[RUN]],
                seed=row.get(_SEED, ""),
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


def _groups(runs: Iterable[tuple[Row, str]]) -> dict[str, int]:
    """The group of each run, by its folder, from its row and setting.

    A learning rate that was chosen for each setting keeps no runs apart. Where a setting was
    trained with several on one seed, they are no choice, and each is a group of its own.
    """
    by_kind: dict[tuple[tuple[str, str], ...], list[tuple[Row, str]]] = {}
    for row, setting in runs:
        by_kind.setdefault(_all_but_setting(row), []).append((row, setting))
    found: dict[str, int] = {}
    count = 0
    for those in by_kind.values():
        rates: dict[tuple[str, str], set[str]] = {}
        for row, setting in those:
            place = setting, row.get(_SEED, "")
            rates.setdefault(place, set()).add(row.get(_RATE, ""))
        several = any(len(of) > 1 for of in rates.values())
        apart = [row.get(_RATE, "") if several else "" for row, _ in those]
        numbers = {rate: count + i for i, rate in enumerate(dict.fromkeys(apart))}
        count += len(numbers)
        found |= {row[RUN]: numbers[rate] for (row, _), rate in zip(those, apart, strict=True)}
    return found


def _all_but_setting(row: Row) -> tuple[tuple[str, str], ...]:
    return tuple(
        (key, value)
        for key, value in row.items()
        if key not in (*MEASURED, _RATE) and not key.startswith(_APART)
    )


def _levels(row: Row) -> tuple[Config, list[Level]]:
    config = recipe.load(Path(row[RUN]) / "config.yaml").config
    if PERIODS not in row:
        raise UserError(f"--frontier: {row[RUN]}: its summary.json has no levels")
    return config, levels_of(config)


def _bytes_per_token(row: Row, config: Config, levels: list[Level], cluster: Cluster) -> float:
    parallel = config.parallel
    group_nodes = cluster.nodes_of_a_data_group(parallel.tensor, parallel.pipeline)
    sent = traffic(config, levels, _vocabulary(row, config), cluster.nodes, group_nodes=group_nodes)
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
