"""Seconds of a step in which what computes had nothing to do."""

from __future__ import annotations

import time
from typing import Any

import torch
import world
from levels.level_runs import VOCABULARY, load, sequences

from nlscale.step.waits import WaitClock

PAUSE = 0.2


def test_reading_and_everything_else_between_two_steps_are_told_apart() -> None:
    clock = WaitClock(torch.device("cpu"))
    clock.begin()
    first = clock.end(link=0.5)
    assert (first.data, first.link, first.host) == (0.0, 0.5, 0.0), "nothing was before it"
    time.sleep(PAUSE)
    with clock.reading():
        time.sleep(2 * PAUSE)
    clock.begin()
    time.sleep(PAUSE)  # the step itself
    second = clock.end(link=0.0)
    assert second.host >= PAUSE and second.data >= 2 * PAUSE
    clock.begin()
    assert clock.end(link=0.0).data == 0.0, "that was the step before"


def test_what_is_called_free_again_does_not_count() -> None:
    clock = WaitClock(torch.device("cpu"))
    clock.begin()
    clock.end(link=0.0)
    with clock.reading():
        time.sleep(2 * PAUSE)
    clock.free()  # as after a validation
    clock.begin()
    waits = clock.end(link=0.0)
    assert waits.data == 0.0 and waits.host < 2 * PAUSE


def waits_of_steps(late: int) -> list[dict[str, float]]:
    """Of three steps; in the last, the reductions of this rank start late."""
    from nlscale.levels.spectrum import spectrum
    from nlscale.parallel.layout import process_groups
    from nlscale.step.trainer import Trainer

    config = load(["levels=[1]", "train.steps=3", "parallel.overlap=false"])
    found: list[Any] = []
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, spectrum(config.levels, 100), VOCABULARY)
        finish = trainer.optimizer.finish_backward

        def late_finish() -> None:
            if trainer.counters.step == 3 and layout.rank == late:
                time.sleep(5 * PAUSE)
            finish()

        trainer.optimizer.finish_backward = late_finish  # type: ignore[method-assign]
        for step in range(1, 4):
            trainer.take_step(sequences(config, step)[layout.data_rank :: layout.data_size])
            found.append(trainer.waits.link)
    return found


def test_a_node_that_comes_late_is_waited_for() -> None:
    results = world.run(2, waits_of_steps, 1, ranks_per_node=1)
    assert results[0][2] >= 4 * PAUSE
