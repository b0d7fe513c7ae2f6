"""Runs that differ in length alone share the stable phase of their learning rate.

With wsd the learning rate stays at its peak until a run begins to cool down, whatever its length.
So a longer run need not begin at step 1: it begins from the checkpoint at which the next shorter
one starts to cool down, and is bit for bit the run that it would have been.

    5x   |--------------->~~~~
    10x                  |--------------->~~~~~~~~      - stable    ~ cooling down
    20x                                  |------------------------------->~~~~~~~~~~~~~~~~
    40x ...

Every step of the stable phase is trained once. Each run keeps the checkpoint at the end of its
stable phase, so that a sweep can be extended to longer runs later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from nlscale.checkpoint.same_run import stable_end
from nlscale.config import recipe
from nlscale.errors import UserError
from nlscale.scaling.sweep.runs import Run
from nlscale.scaling.sweep.spec import Sweep
from nlscale.scaling.sweep.status import Status, checkpoint_at


def share_stable_phases(
    sweep: Sweep, runs: list[Run], states: Mapping[str, Status], earlier: Sequence[Run] = ()
) -> None:
    """Set where each run begins, and what it keeps for others.

    A run that has finished without its checkpoint being there any more is not begun from.

    Args:
        sweep: as read.
        runs: all of it; changed in place.
        states: where they and `earlier` stand, by name.
        earlier: those of the rounds of a search before, of which this has been asked already.

    Raises:
        UserError: two of them are the same run.
    """
    chains: dict[str, list[Run]] = {}
    placed = {run.name for run in earlier}
    for run in (*earlier, *runs):
        chains.setdefault(_but_for_length(run), []).append(run)
    for chain in chains.values():
        chain.sort(key=lambda run: run.steps)
        before: list[Run] = []
        for run in chain:
            if run.name in placed:
                before.append(run)
                continue
            run.chain = chain[0].name
            same = before and before[-1].steps == run.steps
            if same and before[-1].name not in placed:
                raise UserError(
                    f"{sweep.path}: {before[-1].name} and {run.name} are the same run of "
                    f"{run.steps:,} steps; take one of them out"
                )
            _keep_stable_end(run)
            start = next((r for r in reversed(before) if _can_begin_from(r, states[r.name])), None)
            if start is not None:
                run.start, run.start_step = start, _stable(start)
                run.config.resume.start = str(checkpoint_at(start, run.start_step))
                start.branches.append(run)
            before.append(run)


def _stable(run: Run) -> int:
    """Steps that it shares with longer runs."""
    return stable_end(run.config, [run.steps])


def _can_begin_from(run: Run, state: Status) -> bool:
    there = checkpoint_at(run, _stable(run)).exists()
    return _stable(run) > 0 and (there or not state.finished)


def _keep_stable_end(run: Run) -> None:
    if _stable(run):
        checkpoint = run.config.checkpoint
        checkpoint.steps = sorted({*checkpoint.steps, _stable(run)})
        checkpoint.keep_every = _stable(run)  # for good; later multiples are few or none


def _but_for_length(run: Run) -> str:
    plain = recipe.to_plain(run.config)
    del plain["run"]["dir"], plain["train"]["steps"]
    # what is set here, of earlier rounds already
    del plain["resume"]["start"], plain["checkpoint"]["steps"], plain["checkpoint"]["keep_every"]
    return json.dumps(plain)
