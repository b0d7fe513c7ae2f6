"""Link time that the last backward pass hides, against a simulation in small steps of time."""

from __future__ import annotations

import math

import pytest

from nlscale.cluster.machines import Cluster
from nlscale.config import recipe
from nlscale.config.vocabulary import Config
from nlscale.levels.spectrum import spectrum, sync_group
from nlscale.model.sizes import level_parameters
from nlscale.plan import make_plan
from nlscale.plan.link import Links
from nlscale.plan.plan import Plan

VOCABULARY = 256
KEYS = [
    "data.dir=none", "model.vocabulary=256", "data.sequence_length=64", "model.layers=8",
    "model.d_model=64", "model.heads=4", "train.global_batch=16", "train.micro_batch=2",
]  # fmt: skip


def make(*overrides: str) -> Config:
    return recipe.load(None, [*KEYS, *overrides]).config


def cluster(
    nodes: int = 2, gbit: float = 1.0, gpus: int = 2, tflops: float | None = 1.0
) -> Cluster:
    return Cluster("these", nodes, gpus, gbit, 80.0, tflops)


def plan(*overrides: str, seconds: float = 0.2, **machines: float) -> Plan:
    return make_plan(make(*overrides), cluster(**machines), step_seconds=seconds)


SPECTRA = ["levels=[1]", "levels=[1,3]", "levels=[1,2,4]"]


LOCAL = "levels=[1,{period: 2, local: true, outer: {every: 3}}]"


@pytest.mark.parametrize("levels", [*SPECTRA, LOCAL])
@pytest.mark.parametrize("stagger", ["true", "false"])
@pytest.mark.parametrize("gbit", [0.01, 0.3, 100.0])
def test_hidden_and_exposed_are_the_link_time(levels: str, stagger: str, gbit: float) -> None:
    found = plan(levels, f"levels.stagger={stagger}", "parallel.bucket_size=20000", gbit=gbit)
    assert found.exposure is not None
    run, plain = found.exposure.run, found.exposure.plain
    for i, mean in enumerate(found.aligned.mean_per_level):
        assert run.hidden[i] + run.exposed[i] == pytest.approx(found.cluster.link_seconds(mean))
    assert sum(plain.hidden + plain.exposed) == pytest.approx(
        found.cluster.link_seconds(found.plain)
    )
    assert sum(run.exposed) <= sum(plain.exposed) * (1 + 1e-9)


@pytest.mark.parametrize("levels", SPECTRA)
@pytest.mark.parametrize("gbit", [0.05, 0.3, 2.0])
def test_it_is_what_a_simulation_finds(levels: str, gbit: float) -> None:
    overrides = [levels, "levels.stagger=true", "parallel.bucket_size=1"]
    found = plan(*overrides, gbit=gbit)
    assert found.exposure is not None
    config = make(*overrides)
    assert sum(found.exposure.run.exposed) == pytest.approx(simulated(config, found), rel=0.02)


def simulated(config: Config, found: Plan) -> float:
    """Bits queue as blocks are done, and leave at the link's rate, a small step of time at a time.

    Every block is a bucket of each of its levels.
    """
    levels, layers = spectrum(config.levels, found.tokens_per_step), config.model.layers
    counts = level_parameters(config, 0)
    each = [(n - 64 * (i == 0)) / layers for i, n in enumerate(counts)]
    rate = found.cluster.inter_node_gbit * 1e9
    whole = found.exposure.backward_seconds  # type: ignore[union-attr]
    total, parts = 0.0, 4000
    for step in range(1, found.cycle + 1):
        waiting, seconds, done = 0.0, 0.0, 0
        tick = whole / parts
        while done < layers or waiting > 0:
            seconds += tick
            while done < layers and seconds >= whole * (done + 1) / layers - tick / 2:
                depth = layers - 1 - done
                for level, size in zip(levels, each, strict=True):
                    if sync_group(level, depth, layers, stagger=True).due(step):
                        # a ring over two nodes: every bit once; the vocabulary at both ends
                        waiting += 32 * size
                waiting += 32 * (VOCABULARY * 64 * (depth in (0, layers - 1)))
                waiting += 32 * 64 * (depth == layers - 1)
                done += 1
            waiting = max(0.0, waiting - rate * tick)
        total += max(0.0, seconds - whole)
    return total / found.cycle


def test_nothing_hides_where_nothing_overlaps() -> None:
    found = plan("levels=[1,4]", "parallel.overlap=false")
    assert found.exposure is not None
    assert sum(found.exposure.run.hidden) == sum(found.exposure.plain.hidden) == 0


def test_later_stages_have_longer_to_hide_in() -> None:
    """All wait for the first stage, which ends last."""
    config = make("levels=[1]", "parallel.pipeline=2", "train.global_batch=32")
    whole = make_plan(config, cluster(nodes=4, gbit=0.2), step_seconds=0.4)
    assert whole.exposure is not None
    links = Links(
        config, spectrum(config.levels, 1), VOCABULARY, whole.cluster, 2, whole.pipeline, 0.4
    )
    exposed = [
        sum(links._crossing(list(links._pieces(rank, stagger=False)), rank)[1]) for rank in (0, 1)
    ]
    assert exposed[1] < exposed[0] == pytest.approx(sum(whole.exposure.run.exposed))


def test_half_the_bytes_take_half_the_link() -> None:
    exact, half = (
        plan("levels=[1,4]", f"levels.spectrum.1.wire={wire}") for wire in ("fp32", "bf16")
    )
    assert exact.exposure is not None and half.exposure is not None
    sums = [p.exposure.run.hidden[1] + p.exposure.run.exposed[1] for p in (exact, half)]  # type: ignore[union-attr]
    assert sums[0] == pytest.approx(2 * sums[1])
    assert sum(exact.exposure.plain.exposed) == sum(half.exposure.plain.exposed)
    assert any("approximate" in line for line in half.warnings)
    assert not any("approximate" in line for line in exact.warnings)


def test_seconds_follow_from_the_peak_and_the_utilisation() -> None:
    config = make("levels=[1]")
    found = make_plan(config, cluster(), utilisation=0.5)
    assert found.exposure is not None
    flops = sum(found.flops.values()) * found.tokens_per_step
    assert found.exposure.step_seconds == pytest.approx(flops / (4 * 1e12 * 0.5))
    assert make_plan(config, cluster(tflops=None)).exposure is None
    assert make_plan(config, cluster(nodes=1)).exposure is None
    assert math.isclose(plan("levels=[1]", seconds=3.0).exposure.step_seconds, 3.0)  # type: ignore[union-attr]


def test_rare_updates_and_long_cycles_count_by_their_share() -> None:
    """Periods that hardly divide each other, and one that is longer than many runs."""
    for levels in ("levels=[1,8192]", "levels=[1,3,5,7,64]"):
        found = plan(levels, "levels.stagger=false", "model.hidden=160", gbit=0.05)
        assert found.exposure is not None
        run = found.exposure.run
        for i, mean in enumerate(found.aligned.mean_per_level):
            link = found.cluster.link_seconds(mean)
            assert run.hidden[i] + run.exposed[i] == pytest.approx(link)


def test_in_fp32_only_given_seconds_tell_how_long_a_step_computes() -> None:
    config = make("levels=[1]", "train.dtype=fp32")
    assert make_plan(config, cluster()).exposure is None
    assert make_plan(config, cluster(), step_seconds=0.1).exposure is not None
