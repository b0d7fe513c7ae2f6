"""Memory of a GPU and the pipeline, against real models and megatron-core's schedules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import world

from nlscale.cluster.machines import Cluster
from nlscale.config import recipe
from nlscale.config.vocabulary import Config, Dtype
from nlscale.levels.spectrum import spectrum
from nlscale.model.sizes import level_parameters
from nlscale.model.stages import stage_blocks
from nlscale.plan import memory
from nlscale.plan.activations import Activations
from nlscale.plan.advice import fitting_overrides
from nlscale.plan.memory import GIB
from nlscale.plan.pipeline import most_kept, pipeline
from nlscale.plan.plan import memory_on

VOCABULARY = 64


def make(*overrides: str) -> Config:
    return recipe.load(
        None,
        [
            "data.dir=none",
            "data.sequence_length=64",
            "model.vocabulary=64",
            "model.layers=5",
            "model.d_model=64",
            "model.heads=4",
            "levels=[1,4,16]",
            "train.global_batch=64",
            "train.micro_batch=2",
            *overrides,
        ],
    ).config


SPREAD = [
    ("parallel.tensor=2", "parallel.pipeline=2"),
    ("parallel.tensor=2", "parallel.pipeline=2", "model.cms=independent", "model.mixer=attention"),
    ("parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_stages=2"),
    ("parallel.tensor=2", "parallel.pipeline=2", "parallel.stages=[1,4]", "model.mixer=hope-pure"),
    (
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "levels=[{parts: [norms]},{period: 4, parts: [embedding, head]},"
        "{period: 8, parts: [cms, mixer]}]",
    ),
]


LEVELS = spectrum(make().levels, 1)


def parameters_of_stages() -> list[list[list[int]]]:
    """[configuration][pipeline rank][level]: what a tensor-parallel rank really holds."""
    from nlscale.model.decoder import Decoder
    from nlscale.model.layers import megatron_config
    from nlscale.parallel.layout import process_groups

    found = []
    with process_groups(make("parallel.tensor=2")):
        for overrides in SPREAD:
            cut = make(*overrides)
            config = make(*overrides, "parallel.pipeline=1", "parallel.virtual_stages=1")
            counts = [[0] * 3 for _ in range(cut.parallel.pipeline)]
            for stage, blocks in enumerate(stage_blocks(cut, VOCABULARY)):
                model = Decoder(config, megatron_config(config), VOCABULARY, blocks)
                for name, parameter in model.named_parameters():
                    level, _ = model.level_and_depth(name)
                    counts[stage % cut.parallel.pipeline][level] += parameter.numel()
            found.append(counts)
    return found


def test_weights_and_state_are_those_of_the_parameters_a_rank_holds() -> None:
    for overrides, held in zip(SPREAD, world.run(2, parameters_of_stages)[0], strict=True):
        for dtype, weight, state in (("bf16", 2, 12), ("fp32", 4, 8)):
            config = make(*overrides, f"train.dtype={dtype}")
            ranks = memory(config, spectrum(config.levels, 1), VOCABULARY, 4, 8)
            for rank, levels in zip(ranks, held, strict=True):
                assert rank.weights == weight * sum(levels), overrides
                assert rank.gradients == 4 * sum(levels)
                assert rank.windows == 4 * sum(levels[1:]) / 4
                assert rank.optimizer == state * sum(levels) / 4
                assert rank.total == pytest.approx(sum(rank.terms.values()))


STATE = [
    ("train.dtype=bf16",),
    ("train.dtype=fp32",),
    (
        "train.dtype=bf16",
        "parallel.tensor=2",
        "optimizer.rule=m3",
        "levels.spectrum.1.optimizer={rule: muon}",
    ),
    ("train.dtype=bf16", "parallel.pipeline=2", "optimizer.rule=muon"),
    ("train.dtype=bf16", "levels.spectrum.0.outer.every=3", "levels.spectrum.1.outer.every=1"),
]


def steady(*overrides: str) -> Config:
    return make("levels=[1,2]", "data.sequence_length=16", "train.global_batch=4", *overrides)


def bytes_between_steps(*overrides: str) -> tuple[int, int, int]:
    """Pipeline rank of this rank, and bytes of all its tensors once every level has updated; of
    what updates weights, exactly."""
    import gc

    import torch

    from nlscale.parallel.layout import process_groups
    from nlscale.step.micro_batches import Batch
    from nlscale.train.loop import Trainer

    config = steady(*overrides)
    with process_groups(config) as layout:
        trainer = Trainer.build(config, layout, spectrum(config.levels, 1), VOCABULARY)
        tokens = torch.zeros(2, 16, dtype=torch.long)
        for _ in range(3):
            trainer.take_step([Batch(tokens, tokens, 2)] * (2 // layout.data_size))
        gc.collect()
        held = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
        for group in trainer.optimizer.groups:
            for parameter, state in group.optimizer.optimizer.state.items():
                held += [parameter, *(x for x in state.values() if isinstance(x, torch.Tensor))]
        kept = [x for shard in trainer.shards() for x in shard.state().values()]
        if config.train.dtype == Dtype.bf16:
            kept += [shard.weights for shard in trainer.shards()]
        outers = [(shard.outer, shard.weights) for shard in trainer.shards()]
        kept += [x[p] for o, p in outers if o is not None for x in (o.before, o.momentum)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
    updates = sum(x.nbytes for x in kept)
    return layout.pipeline_rank, sum(storages.values()), updates


@pytest.mark.parametrize("overrides", STATE, ids=" ".join)
def test_between_steps_a_rank_holds_what_is_planned(overrides: tuple[str, ...]) -> None:
    config = steady(*overrides)
    in_node = 2 // (config.parallel.tensor * config.parallel.pipeline)
    planned = memory(config, spectrum(config.levels, 1), VOCABULARY, in_node, 1)
    found = world.run(2, bytes_between_steps, *overrides)
    for rank, real, _ in found:
        state = sum(planned[rank].terms.values()) - planned[rank].activations
        assert state == pytest.approx(real, rel=0.02)
    for rank, one in enumerate(planned):
        updates = sum(each for held_by, _, each in found if held_by == rank)
        assert one.optimizer * in_node * config.parallel.tensor == updates


def test_what_takes_the_place_of_activations_counts_where_it_is_more() -> None:
    keys = ["optimizer.rule=muon", "train.dtype=bf16"]
    short, long = (
        memory(make(*keys, f"data.sequence_length={n}"), LEVELS, VOCABULARY, 1, 1)[0]
        for n in (16, 4096)
    )
    assert short.update == long.update > short.activations
    assert short.total == sum(short.terms.values()) - short.activations + short.update
    assert long.total == sum(long.terms.values()) and long.activations > long.update


def test_a_pipeline_rank_keeps_the_micro_batches_in_flight() -> None:
    config = make("parallel.pipeline=2", "parallel.stages=[2,3]")
    batch = Activations(config, VOCABULARY)
    first, last = memory(config, spectrum(config.levels, 1), VOCABULARY, 1, 8)
    sent, moment = batch.residual, batch.transient()
    assert first.activations == 2 * (batch.embedding() + batch.blocks(range(2)) + sent) + moment
    assert last.activations == batch.blocks([0]) * 3 + batch.head() + moment
    assert batch.head() > 2 * 64 * VOCABULARY * batch.element
    alone = memory(config, spectrum(config.levels, 1), VOCABULARY, 1, 1)
    assert alone[0].activations - moment == (first.activations - moment) / 2


def test_sequence_parallelism_and_recomputing_take_less() -> None:
    def activations(*overrides: str) -> float:
        config = make("parallel.tensor=2", *overrides)
        return memory(config, spectrum(config.levels, 1), VOCABULARY, 1, 1)[0].activations

    whole = activations()
    for override in (
        "parallel.sequence=true",
        "train.recompute=[cms]",
        "train.recompute=[mixer]",
        "train.micro_batch=1",
    ):
        assert activations(override) < whole, override
    both = activations("train.recompute=[mixer,cms]")
    assert both < activations("train.recompute=[mixer]")


@pytest.mark.parametrize("virtual", [1, 2, 3])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 2), (2, 8), (4, 4), (4, 12)])
def test_in_flight_as_megatron_core_schedules_them(
    ranks: int, micro_batches: int, virtual: int
) -> None:
    from megatron.core.pipeline_parallel.schedules import (
        get_pp_rank_microbatches,
        get_schedule_table,
    )

    stages = [1.0, 10.0, 100.0][:virtual]
    for rank in range(ranks):
        group = SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
        communicator = SimpleNamespace(
            pp_group=group, virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None
        )
        total, _, warmup, _ = get_pp_rank_microbatches(
            micro_batches, virtual, ranks, p2p_communicator=communicator
        )
        order = [stage for _, stage in get_schedule_table(micro_batches, virtual, ranks)]
        forward = [stages[stage] for stage in order]
        backward = [stages[virtual - 1 - stage] for stage in order]
        ahead = [sum(forward[: i + 1]) - sum(backward[: max(0, i - warmup)]) for i in range(total)]
        assert most_kept(stages, ranks, rank, micro_batches) == max(ahead)
        count = min(warmup + 1, total)
        assert most_kept([1.0] * virtual, ranks, rank, micro_batches) == count


def test_the_bubble_and_the_imbalance() -> None:
    assert pipeline(make(), VOCABULARY, 8).bubble == 0
    config = make("parallel.pipeline=2", "model.layers=8")
    assert pipeline(config, VOCABULARY, 7).bubble == 1 / 8
    config.parallel.virtual_stages = 2
    assert pipeline(config, VOCABULARY, 8).bubble == 1 / 17
    config = make("parallel.pipeline=2", "parallel.stages=[1,4]")
    assert pipeline(config, 0, 8).imbalance == pytest.approx(4 / 2.5, rel=0.01)
    # a head as large as many blocks; the embedding counts half
    config = make("parallel.pipeline=2", "parallel.stages=[4,1]")
    head = 40000 * 64 / (sum(level_parameters(config, 0)) / 5)
    expected = (1 + head) / (5 + 1.5 * head) * 2
    assert pipeline(config, 40000, 8).imbalance == pytest.approx(expected)


def test_what_is_advised_fits_and_changes_as_little_as_it_can() -> None:
    large = ("data.sequence_length=512", "train.micro_batch=4", "model.layers=8")
    config = make(*large)
    alternatives = [
        ("train.recompute=[cms]",),
        ("train.micro_batch=2",),
        ("train.micro_batch=1", "train.recompute=[mixer,cms]"),
        ("parallel.tensor=4", "parallel.sequence=true", "train.micro_batch=1"),
    ]
    changes = []
    for overrides in alternatives:
        # a GPU for which these would do
        needs = memory_on(make(*large, *overrides), Cluster("c", 1, 8, 1.0, 1.0)).largest.total
        cluster = Cluster("c", 1, 8, 1.0, needs / GIB / 0.9 * 1.0001)
        advised = fitting_overrides(config, cluster)
        assert advised is not None
        assert memory_on(make(*large, *advised), cluster).fits
        changes.append([text.split("=")[0] for text in advised])
    assert changes[0] == ["train.recompute"]
    assert not any("parallel.tensor" in keys for keys in changes[:3])
    assert fitting_overrides(config, Cluster("c", 1, 8, 1.0, 1e-4)) is None
