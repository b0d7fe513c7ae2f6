"""What crosses at an outer step: rounded, and what that leaves; never what is not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import world
from levels.level_runs import VOCABULARY, load, sequences, spoiled_gradient

from nlscale.errors import TrainingFailed
from nlscale.levels.outer import Outer
from nlscale.levels.spectrum import spectrum
from nlscale.parallel.layout import process_groups
from nlscale.step.trainer import Trainer

ROUNDED = [
    "levels=[{name: all, wire: int8, local: true, outer: {every: 3}}]",
    "levels.stagger=false",
    "model.layers=2",
    "train.global_batch=4",
]


def owed(outer: Outer) -> torch.Tensor:
    """What this node is still to send of each element of the group, as node and as owner."""
    kept = outer.g.window.owed
    assert kept is not None and kept.owned is not None
    whole = [error.clone() for error in kept.errors]
    for error, part, total in zip(whole, kept.owned, kept.totals, strict=True):
        error[slice(*part)] += total
    return torch.cat(whole)


def rounded(overrides: list[str]) -> list[dict[str, Any]]:
    """Train on this rank of a world, with a step dropped at which an outer step is due.

    Returns:
        Of each outer step, summed over the nodes: n_k / n times D of node k, what each of them owed
        before, and owes afterwards; and what arrived, the same on all.
    """
    config, found = load(overrides), list[dict[str, Any]]()
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, spectrum(config.levels, 100), VOCABULARY)
        ((group, outer),) = trainer.optimizer.following.outers.items()
        start, finish = outer.start, outer.finish

        def begin(share: float | None) -> None:
            counted = trainer.optimizer.progress[group].outer_counted
            share_ = counted[layout.node_rank] / sum(counted)
            mine = [share_ * (b - p.detach()) for p, b in outer.before.items()]
            found.append({"moved": torch.cat(mine), "before": owed(outer)})
            start(share)

        def end(whole: bool) -> None:
            found[-1]["arrived"] = torch.cat([p.grad.flatten() for p in outer.before])
            shards = outer.g.window.shards
            found[-1]["shards"] = torch.cat([s.flatten() for s in shards])
            finish(whole)
            found[-1]["after"] = owed(outer)

        outer.start, outer.finish = begin, end  # type: ignore[method-assign]
        for step in range(1, config.train.steps + 1):
            mine = sequences(config, step)[layout.data_rank :: layout.data_size]
            if step == 3 and layout.rank == 1:
                with spoiled_gradient(trainer.stages[-1]):
                    trainer.take_step(mine)
            else:
                trainer.take_step(mine)
        for own in found:
            for key in ("moved", "before", "after"):
                dist.all_reduce(own[key])
        return found


def test_what_an_outer_step_rounds_off_is_sent_with_the_next() -> None:
    ranks = world.run(2, rounded, [*ROUNDED, "train.steps=8"], ranks_per_node=1)
    for mine, theirs in zip(*ranks, strict=True):
        assert torch.equal(mine["arrived"], theirs["arrived"])
    assert len(ranks[0]) == 3, "at steps 3, 6 and 8"
    for own in ranks[0]:
        # Elements of a shard that belong to no parameter are padding, and zero.
        sent = own["shards"].double() + own["after"].double() - own["before"].double()
        assert own["after"].norm() > 0
        assert sent.sum() == pytest.approx(own["moved"].double().sum(), abs=1e-6)
        assert sent.norm() == pytest.approx(own["moved"].double().norm(), rel=1e-5)


def not_finite(overrides: list[str]) -> tuple[str, bool]:
    """One element of the last rank becomes NaN before an outer step.

    Returns:
        What ends the run; whether what outer steps keep, and the errors of rounding, are those of
        before.
    """
    config = load(overrides)
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, spectrum(config.levels, 100), VOCABULARY)
        (outer,) = trainer.optimizer.following.outers.values()

        def kept() -> list[torch.Tensor]:
            return [t.clone() for t in (*outer.before.values(), *outer.momentum.values(),
                                        owed(outer))]  # fmt: skip

        for step in range(1, config.train.steps + 1):
            if step == 6:
                before = kept()
                if layout.rank == layout.world - 1:
                    next(iter(outer.before)).detach().view(-1)[0] = float("nan")
            try:
                trainer.take_step(sequences(config, step)[layout.data_rank :: layout.data_size])
            except TrainingFailed as error:
                same = all(torch.equal(a, b) for a, b in zip(kept(), before, strict=True))
                return f"{step}: {error}", same
    raise AssertionError("nobody has seen it")


def test_weights_that_are_not_finite_end_the_run_and_enter_nothing() -> None:
    for said, same in world.run(2, not_finite, [*ROUNDED, "train.steps=9"], ranks_per_node=1):
        assert said.startswith("6: weights of level 'all' are not finite on some rank before an")
        assert same
