"""Memory of a GPU, term by term, from the configuration alone.

    weights       2 bytes (bf16) or 4 (fp32) a parameter that the rank holds
    gradients     4 bytes a parameter: megatron-core's buffer, in fp32
    windows       4 bytes a parameter of a level of period above 1, sharded over a node; of one that
                  crosses as integers, likewise, 8 for its errors of rounding and what becomes of
                  them and, with `parallel.shard_optimizer=node`, 8 more divided by the nodes; and
                  what a level that crosses rounded takes in passing
    optimizer     what the rules keep (8 bytes a parameter, Adam's moments; of each level and of
                  matrices by their own rule), with bf16 4 more, the fp32 weights, 8 of a level
                  that makes outer steps, and 4 of each copy of it that a level holds
                  (`model.cms: nested`); sharded over a node, or with `parallel.shard_optimizer`
                  all or matrices over all nodes; without what lies in host memory, and with the
                  ring through which that is streamed (`nlscale.plan.host_memory`)
    activations   what `nlscale.plan.activations` counts, for the micro batches in flight

After the backward pass there are no activations, but for a while something else, and the largest
counts:

    validation    one micro batch without a backward pass: a block, or the head
    update        what the optimizer takes in passing (`nlscale.plan.update`)
    comparison    what a comparison of the replicas takes in passing

Sharded over a node: divided by the data-parallel ranks of one node. `USABLE` of the memory counts
as usable. The rest is for what is not counted: the CUDA context, NCCL's buffers, fragmentation,
and the gradients that pass between the parts of a block.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from nlscale.cluster.spread import COMPARED_AT_ONCE
from nlscale.config.vocabulary import Config, Dtype, Sharding, WireFormat
from nlscale.levels.groups import parameters_by_depth
from nlscale.levels.kept import kept_by_depth, rules_by_level
from nlscale.levels.ring_pieces import off_device, ring_bytes, streamed
from nlscale.levels.spectrum import INTEGER_BITS, ROUNDED_AT_ONCE, Level
from nlscale.model.sizes import places
from nlscale.model.stages import stage_blocks
from nlscale.plan.activations import Activations
from nlscale.plan.host_memory import moved_bytes
from nlscale.plan.pipeline import most_kept
from nlscale.plan.update import update_bytes

USABLE = 0.9
"""Share of a GPU's memory that a run may fill by this count **[choice]**."""
GIB = 2**30
OUTER_BYTES = 8
"""Of a parameter that has outer steps: what it was after the last one, and the momentum, fp32."""
COPY_BYTES = 4
"""Of a parameter in a copy that a level holds, fp32."""
_IN_THEIR_PLACE = ("update", "validation", "comparison")


@dataclass(frozen=True)
class RankMemory:
    """Bytes on a GPU of one pipeline rank, at the fullest moment of a step."""

    weights: float
    gradients: float
    windows: float
    optimizer: float
    activations: float
    update: float
    """In place of activations, while there are none."""
    validation: float
    """Likewise."""
    comparison: float
    """Likewise."""

    @property
    def terms(self) -> dict[str, float]:
        """Bytes of each term that a step holds, by its name."""
        return {name: size for name, size in asdict(self).items() if name not in _IN_THEIR_PLACE}

    @property
    def total(self) -> float:
        return sum(self.terms.values()) + max(0.0, self.instead - self.activations)

    @property
    def instead(self) -> float:
        """The largest of what takes the place of activations."""
        return max(getattr(self, name) for name in _IN_THEIR_PLACE)


@dataclass(frozen=True)
class Memory:
    """Of every pipeline rank, and what a GPU has."""

    ranks: list[RankMemory]
    gpu_gib: float

    @property
    def fullest(self) -> int:
        """The pipeline rank that needs most."""
        return max(range(len(self.ranks)), key=lambda rank: self.ranks[rank].total)

    @property
    def largest(self) -> RankMemory:
        return self.ranks[self.fullest]

    @property
    def usable_gib(self) -> float:
        return USABLE * self.gpu_gib

    @property
    def fits(self) -> bool:
        return self.largest.total <= self.usable_gib * GIB


def memory(
    config: Config,
    levels: list[Level],
    vocabulary: int,
    in_node: int,
    micro_batches: int,
    group_nodes: int = 1,
) -> list[RankMemory]:
    """The memory of a configuration on a GPU of each pipeline rank.

    Args:
        config: the run.
        levels: its spectrum, periods in steps.
        vocabulary: token ids of the model.
        in_node: data-parallel ranks of one node.
        micro_batches: of a rank in a step.
        group_nodes: nodes that a data-parallel group spans.

    Raises:
        UserError: fewer blocks than stages, or `parallel.stages` that do not fit.
    """
    bf16 = config.train.dtype == Dtype.bf16
    ranks, batch = config.parallel.pipeline, Activations(config, vocabulary)
    stages = stage_blocks(config, vocabulary)
    spread = in_node * (group_nodes if config.parallel.shard_optimizer != Sharding.node else 1)
    result = []
    for rank in range(ranks):
        mine = stages[rank::ranks]
        held = [sum(counts) for counts in held_by_stage(config, vocabulary, mine)]
        parameters = sum(held)
        by_rules = [sum(kept) for kept in kept_by_stage(config, vocabulary, mine)]
        _, freed = moved_bytes(config, held, by_rules, off_device(config))
        passing, _ = moved_bytes(config, held, by_rules, streamed(config))
        waiting = sum(n for level, n in zip(levels, held, strict=True) if level.period > 1)
        beside = sum(OUTER_BYTES * n for level, n in zip(levels, held, strict=True) if level.outer)
        beside += COPY_BYTES * copied_by_stage(config, vocabulary, mine)
        kept = most_kept([_stage(batch, blocks) for blocks in mine], ranks, rank, micro_batches)
        result.append(
            RankMemory(
                weights=parameters * (2 if bf16 else 4),
                gradients=parameters * 4,
                windows=waiting * 4 / in_node
                + _owed(config, levels, held, group_nodes) / in_node
                + _crossing(levels, held, in_node, group_nodes),
                optimizer=(sum(by_rules) - freed + parameters * (4 if bf16 else 0) + beside)
                / spread
                + (ring_bytes(config) if passing else 0),
                activations=kept + batch.transient() + batch.gathered(),
                update=update_bytes(
                    config,
                    levels,
                    vocabulary,
                    [depth for blocks in mine for depth in blocks],
                    config.parallel.tensor * spread,
                ),
                validation=batch.forward(head=config.model.layers in [b.stop for b in mine]),
                comparison=_comparison(config, vocabulary),
            )
        )
    return result


def _owed(config: Config, levels: list[Level], held: list[float], group_nodes: int) -> float:
    """Errors of rounding, those kept and those made (`nlscale.levels.feedback.Owed`)."""
    if group_nodes == 1:
        return 0.0
    rounded = sum(n for level, n in zip(levels, held, strict=True) if level.wire in INTEGER_BITS)
    sent_back = config.parallel.shard_optimizer == Sharding.node
    return rounded * 8 * (1 + sent_back / group_nodes)


def _crossing(levels: list[Level], held: list[float], in_node: int, group_nodes: int) -> float:
    """8 bytes an element of what crosses rounded at a time."""
    if group_nodes == 1:
        return 0.0
    shards = [
        n / in_node for level, n in zip(levels, held, strict=True) if level.wire != WireFormat.fp32
    ]
    return min(8 * max(shards, default=0.0), ROUNDED_AT_ONCE)


def _comparison(config: Config, vocabulary: int) -> float:
    """8 bytes an element of the largest tensor, which is no more than a level has in a block."""
    if not config.parallel.replica_check_every:
        return 0.0
    largest = max(map(max, parameters_by_depth(config, vocabulary))) / config.parallel.tensor
    return min(8 * largest, COMPARED_AT_ONCE)


def _stage(batch: Activations, blocks: range) -> float:
    """Bytes that one micro batch keeps in a model stage."""
    kept = batch.blocks(blocks)
    if blocks.start == 0:
        kept += batch.embedding()
    # the schedule holds on to what an earlier stage has sent
    return kept + (batch.head() if blocks.stop == batch.config.model.layers else batch.residual)


def held_by_stage(
    config: Config, vocabulary: int, stages: list[range]
) -> list[tuple[float, float]]:
    """Parameters of each level that a rank holds of these model stages, fastest level first.

    Of each its part of those that are split over the tensor-parallel ranks, and those that each of
    these holds whole: norms, and the weights of a mixture.
    """
    depths = {depth for blocks in stages for depth in blocks}
    split, whole = ([0] * len(config.levels.spectrum) for _ in range(2))
    for place in places(config, vocabulary):
        count = len(depths.intersection(place.depths))
        split[place.level] += count * (place.parameters - place.whole)
        whole[place.level] += count * place.whole
    return [(s / config.parallel.tensor, float(w)) for s, w in zip(split, whole, strict=True)]


def copied_by_stage(config: Config, vocabulary: int, stages: list[range]) -> float:
    """Parameters in copies that levels hold, of these model stages: a rank's part of them, as of
    what is split over the tensor-parallel ranks."""
    depths = {depth for blocks in stages for depth in blocks}
    return (
        sum(
            place.copied * len(depths.intersection(place.depths))
            for place in places(config, vocabulary)
        )
        / config.parallel.tensor
    )


def kept_by_stage(
    config: Config, vocabulary: int, stages: list[range]
) -> list[tuple[float, float]]:
    """Bytes that the rules keep of what `held_by_stage` counts, before they are sharded.

    What each tensor-parallel rank holds whole is no matrix.
    """
    depths = [depth for blocks in stages for depth in blocks]
    found = []
    for own, (_, whole), by_depth in zip(
        rules_by_level(config),
        held_by_stage(config, vocabulary, stages),
        kept_by_depth(config, vocabulary),
        strict=True,
    ):
        on_every = whole * own.of(matrix=False).state_bytes
        split = (sum(by_depth[depth] for depth in depths) - on_every) / config.parallel.tensor
        found.append((split, on_every))
    return found
