"""The gradient noise scale: unbiased, and of the gradients that the windows really hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import world
from levels.level_runs import VOCABULARY, load, sequences, spoiled_gradient

from nlscale.levels.noise import GradientNoise, estimate, noise_record, see_windows
from nlscale.levels.spectrum import levels_of, sync_group
from nlscale.model.decoder import Decoder
from nlscale.model.init import initialize
from nlscale.model.layers import megatron_config
from nlscale.parallel.layout import process_groups
from nlscale.step.trainer import Trainer

NODES, SIZE, WINDOWS = 2, 400, 300


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [1, 4])
def test_estimates_are_within_their_error_of_a_known_covariance(seed: int, steps: int) -> None:
    """Of normal gradients with a covariance of their own in every direction, unequal batches.

    Var |x|^2 = 2 tr C^2 + 4 m C m of a normal x of mean m and covariance C bounds the error of the
    mean of many estimates.
    """
    random = np.random.default_rng(seed)
    spread, mean = random.uniform(0.2, 2.0, SIZE), random.normal(0, 0.05, SIZE)
    found, together = [], GradientNoise()
    for _ in range(WINDOWS):
        own, summed = GradientNoise(), np.zeros(SIZE)
        for _ in range(steps):
            tokens = int(random.integers(20, 60)) * NODES  # of a step
            share = tokens // NODES
            parts = share * mean + np.sqrt(share * spread) * random.normal(size=(NODES, SIZE))
            own.add(float((parts**2).sum()), tokens, NODES)
            summed += parts.sum(0)
        w = float(((summed / own.counted) ** 2).sum())
        values = estimate(own.squares, own.counted_squares, own.counted, w)
        assert values is not None
        found.append(values)
        see_windows([own], w)
        together.see(*values)
    noise, signal = spread.sum(), (mean**2).sum()
    parts = NODES * steps
    counted = 40 * parts  # tokens of a window, about
    # the small batches give S with (parts - 1) SIZE degrees of freedom; w gives |G|^2
    error_noise = np.sqrt(2 * (spread**2).sum() / (parts - 1) / WINDOWS)
    of_w = 2 * (spread**2).sum() / counted**2 + 4 * (mean**2 * spread).sum() / counted
    error_signal = np.sqrt((of_w + (error_noise**2 * WINDOWS) / counted**2) / WINDOWS)
    means = np.mean(found, axis=0)
    assert abs(means[0] - noise) < 4 * error_noise
    assert abs(means[1] - signal) < 4 * 1.3 * error_signal
    scale = noise_record([together])["gradient_noise_scale"]
    assert scale == pytest.approx(noise / signal, rel=0.5)


def test_a_window_of_one_part_tells_nothing() -> None:
    own = GradientNoise()
    own.add(3.0, 2**30 + 1, nodes=1)
    assert estimate(own.squares, own.counted_squares, own.counted, 2.0) is None
    see_windows([own], 2.0)
    assert set(noise_record([own]).values()) == {None}


def test_windows_that_close_together_share_an_estimate_where_they_are_alike() -> None:
    first, second, other = GradientNoise(), GradientNoise(), GradientNoise()
    for own, square in ((first, 9.0), (second, 5.0), (other, 5.0)):
        own.add(square, 8, nodes=1)
        own.add(square, 8 + 2 * (own is other), nodes=1)
    see_windows([first, other], 0.1)
    assert first.weight == 0
    see_windows([first, second], 0.1)
    noise, signal = estimate(28.0, 128.0, 16, 0.1)  # type: ignore[misc]
    record = noise_record([first, second])
    assert record["gradient_noise"] == pytest.approx(noise)
    assert record["gradient_signal"] == pytest.approx(signal)


RUN = [
    "model.layers=2",
    "data.sequence_length=16",
    "train.global_batch=4",
    "train.steps=6",
    "levels=[1,3]",
    "levels.stagger=false",
    "optimizer.learning_rate=1e-9",
    "parallel.bucket_size=300",
]
SPOILED = 2
LAYOUTS = {
    "one rank": (1, 1, []),
    "tensor, two nodes": (4, 2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "pipeline over two nodes": (4, 1, ["parallel.pipeline=2"]),
    "sharded over two nodes": (4, 2, ["parallel.shard_optimizer=all"]),
    "every step": (2, 1, ["levels.reduction=every-step"]),
    "not overlapped": (2, 1, ["parallel.overlap=false"]),
}


def run(overrides: list[str]) -> list[list[tuple[float, int, float]]]:
    """What the noise of each sync group holds when windows close; at step 2 a rank spoils it."""
    config = load(overrides)
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, levels_of(config), VOCABULARY)
        found = []
        for step in range(1, config.train.steps + 1):
            mine = sequences(config, step)[layout.data_rank :: layout.data_size]
            held: list[Any] = []
            see = trainer.optimizer._count

            def seen(update: Any, held: list = held, see: Any = see) -> Any:
                held += [
                    (p.noise.squares, p.noise.counted, p.noise.counted_squares)
                    for p in trainer.optimizer.progress.values()
                ]
                return see(update)

            trainer.optimizer._count = seen  # type: ignore[method-assign]
            if step == SPOILED and layout.rank == layout.world - 1:
                with spoiled_gradient(trainer.stages[-1]):
                    trainer.take_step(mine)
            else:
                trainer.take_step(mine)
            trainer.optimizer._count = see  # type: ignore[method-assign]
            found.append(held)
        return found


def plain(overrides: list[str], nodes: int, of_a_node: int) -> list[list[float]]:
    """Sum over nodes of the squares of their gradients, of each level at each step."""
    config = load(overrides)
    with process_groups(config):
        model = Decoder(config, megatron_config(config), VOCABULARY)
        initialize(model, config.run.seed, 0, 1)
        levels, found = levels_of(config), []
        for step in range(1, config.train.steps + 1):
            squares = [0.0] * len(levels)
            ranks = nodes * of_a_node
            for node in range(nodes):
                model.zero_grad()
                for rank in range(node * of_a_node, (node + 1) * of_a_node):
                    for b in sequences(config, step)[rank::ranks]:
                        model(b.tokens, b.targets, b.documents).sum().backward()
                for name, p in model.named_parameters():
                    level, depth = model.level_and_depth(name)
                    assert sync_group(levels[level], depth, 2, stagger=False).phase == 0
                    squares[level] += p.grad.double().square().sum().item()
            found.append(squares)
        return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_hold_the_squares_of_what_each_node_saw(layout: str) -> None:
    ranks, per_node, more = LAYOUTS[layout]
    (seen, *others) = world.run(ranks, run, [*RUN, *more], ranks_per_node=per_node)
    assert all(other == seen for other in others), "every rank knows the same"
    data = ranks // (2 if {"parallel.tensor=2", "parallel.pipeline=2"} & {*more} else 1)
    nodes = 1 if ranks == 1 else 2
    (each,) = world.run(1, plain, RUN, nodes, data // nodes)
    tokens = 4 * 16
    for level, period in enumerate((1, 3)):
        for step in (3, 6):  # at which both close; at step 2 nothing enters
            steps = [s for s in range(step - period + 1, step + 1) if s != SPOILED]
            squares, counted, counted_squares = seen[step - 1][level]
            assert squares == pytest.approx(sum(each[s - 1][level] for s in steps), rel=1e-4)
            assert counted == tokens * len(steps)
            assert counted_squares == pytest.approx(tokens**2 / nodes * len(steps))


def test_of_one_node_and_period_one_nothing_is_measured() -> None:
    (seen,) = world.run(1, run, ["levels=[1]", "train.steps=2", *RUN[:3]])
    assert all(group[0] == 0 for group in seen[0])


def noise_of(overrides: list[str]) -> list[dict[str, float | None]]:
    config = load(overrides)
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, levels_of(config), VOCABULARY)
        for step in range(1, config.train.steps + 1):
            trainer.take_step(sequences(config, step)[layout.data_rank :: layout.data_size])
        return [trainer.optimizer.noise(level) for level in range(2)]


def test_a_level_that_crosses_as_integers_tells_nothing() -> None:
    """What rounding adds would count as signal. On one node nothing crosses."""
    levels = "levels=[{period: 1, wire: bf16}, {period: 2, wire: int8}]"
    keys = [*RUN[:3], "train.steps=2", levels, "levels.stagger=false"]
    for exact, rounded in world.run(2, noise_of, keys, ranks_per_node=1):
        assert exact["gradient_noise"] is not None and rounded == {}
    ((_, rounded),) = world.run(1, noise_of, keys)
    assert rounded["gradient_noise"] is not None
