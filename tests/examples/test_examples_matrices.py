"""A rule over whole matrices that is someone else's: its formula, on one rank and on two."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import world
from levels.level_runs import largest_difference, run_engine
from levels.plain_rules import newton_schulz

ROOT = Path(__file__).parents[2]
SHAPE = (6, 4)


def against_formula() -> dict[str, float]:
    sys.path.insert(0, str(ROOT))
    import examples.additions  # noqa: F401
    from nlscale.config.vocabulary import OptimizerConfig
    from nlscale.levels.exchange import MatrixExchange, MatrixRange
    from nlscale.model.init import constant, tag
    from nlscale.optim.table import rule

    config = OptimizerConfig(learning_rate=0.1, beta1=0.8, weight_decay=0.5)
    matrix: Any = torch.nn.Parameter(torch.randn(SHAPE))
    vector: Any = torch.nn.Parameter(torch.randn(4))
    tag(matrix, constant(0.0), matrix=True)
    tag(vector, constant(0.0))
    expected, m = matrix.detach().clone(), torch.zeros(SHAPE)
    # as megatron-core hands them to the optimizer: flat
    held: Any = torch.nn.Parameter(matrix.detach().flatten().clone())
    for name, value in vars(matrix).items():
        setattr(held, name, value)
    inner: Any = rule("heavy-ball").make(config, 1.0, [held, vector])
    inner.exchange = MatrixExchange(
        {"m": matrix}, {"m": 0}, [MatrixRange("m", 0, held)], None, (0, 1), torch.float32
    )
    first = vector.detach().clone()
    for step in range(5):
        g = torch.randn(SHAPE)
        held.grad, vector.grad = g.flatten(), torch.ones(4)
        inner.found_inf = torch.tensor(float(step == 2))
        inner.step()
        if step != 2:
            m = 0.8 * m + 0.2 * g
            expected -= 0.1 * (0.2 * max(SHAPE) ** 0.5 * newton_schulz(m) + 0.5 * expected)
    assert set(inner.state[held]) == {"step", "momentum"}
    assert set(inner.state[vector]) == {"step", "exp_avg", "exp_avg_sq"}, "the rest is AdamW's"
    assert inner.state[held]["step"] == inner.state[vector]["step"] == 4
    return {
        "matrix": float((held.detach().view(SHAPE) - expected).abs().max()),
        "vector": float((vector.detach() - first).abs().max()),
    }


def trained(overrides: list[str]) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT))
    import examples.additions  # noqa: F401

    return run_engine(
        ["optimizer.rule=heavy-ball", "train.steps=3", "train.global_batch=4", *overrides]
    )


def test_the_rule_is_its_formula_and_leaves_an_empty_window_alone() -> None:
    (found,) = world.run(1, against_formula)
    assert found["matrix"] < 1e-5 and found["vector"] > 0


def test_two_tensor_parallel_ranks_make_the_updates_of_one() -> None:
    keys = ["data.sequence_length=16", "levels=[1,2]", "model.init_std=0.1", "model.layers=2"]
    (one,) = world.run(1, trained, keys)
    two, _ = world.run(2, trained, [*keys, "parallel.tensor=2"])
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert largest_difference(two["parameters"], one["parameters"]) < 1e-5
