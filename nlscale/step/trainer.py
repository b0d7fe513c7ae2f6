"""A rank's part of the model with its optimizer, one training step of it, and where it stands."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from nlscale.cluster.life.watch import doing
from nlscale.config.curriculum import TrainingStage, at_stage, curriculum, stage_of
from nlscale.config.in_context import in_context
from nlscale.config.vocabulary import Config, ContextObjective, Dtype
from nlscale.levels.engine import LevelOptimizer
from nlscale.levels.spectrum import Level
from nlscale.levels.state import (
    OwedShard,
    Shard,
    WindowShard,
    owed_shards,
    shards,
    window_shards,
)
from nlscale.levels.tiers import read_ahead
from nlscale.model.decoder import Decoder, named_parameters
from nlscale.model.kernels import check_kernels
from nlscale.model.layers import megatron_config
from nlscale.model.pattern import document_chunk
from nlscale.model.stages import stage_blocks
from nlscale.ops.documents import Documents
from nlscale.ops.transfer import to_device
from nlscale.parallel.consensus import Requests, Verdict, agree
from nlscale.parallel.layout import Layout
from nlscale.step.draw import draw_together
from nlscale.step.micro_batches import (
    Batch,
    LossMask,
    RowSources,
    run_micro_batches,
    sums_by_source,
)
from nlscale.step.stragglers import BusyTime
from nlscale.step.waits import WaitClock, Waits

_SPIKE_MEMORY = 50


@dataclass
class Counters:
    """What a run's next step follows from, beside weights, optimizer state and windows.

    The same on every rank; a checkpoint holds it as it is.
    """

    step: int = 0
    """Steps taken."""
    samples: int = 0
    """Global number of the next sample."""
    tokens: int = 0
    """Tokens of the steps that were admitted."""
    counted_tokens: int = 0
    """Targets among them that count."""
    dropped: int = 0
    dropped_in_a_row: int = 0
    bytes_sent: float = 0.0
    """Between nodes, by a node, as `nlscale plan` counts them."""
    bytes_saved: float = 0.0
    recent: list[float] = field(default_factory=list)
    """Losses of the last admitted steps that had one, for `train.drop_spikes`."""
    first_loss: float | None = None
    last_losses: list[float] = field(default_factory=list)
    """The same of the run, as many as its summary averages."""


@dataclass
class Trainer:
    """A rank's part of the model with its optimizer, and one training step of it."""

    config: Config
    layout: Layout
    levels: list[Level]
    stages: list[Decoder]
    """What this rank holds of the model: all of it, or one or several pipeline stages."""
    optimizer: LevelOptimizer
    busy: BusyTime
    clock: WaitClock
    curriculum: list[TrainingStage]
    """Of the run."""
    counters: Counters = field(default_factory=Counters)
    waits: Waits = field(default_factory=Waits)
    """Of the last step."""
    asked: list[Decoder] | None = None
    """What stands in for the stages in a training step, with their parameters; None: nothing."""
    kept: dict[str, dict[Any, Tensor]] = field(default_factory=dict)
    """What hooks keep of each parameter, by kind, and by the weights of its `shards`: fp32 of their
    length. Checkpoints hold it."""
    noted: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What hooks note, by their name, as JSON holds it; the same on every rank. Likewise."""

    @classmethod
    def build(
        cls,
        config: Config,
        layout: Layout,
        levels: list[Level],
        vocabulary: int,
        draws: bool = True,
    ) -> Trainer:
        """Make and initialise the model; the same weights on every layout.

        Args:
            config: the run.
            layout: this rank's place.
            levels: the spectrum, periods in steps.
            vocabulary: token ids of the model.
            draws: false where weights are about to be read: what is there instead is anything.
        """
        kernels = layout.device.type == "cuda" and config.train.kernels
        bf16 = config.train.dtype == Dtype.bf16
        megatron = megatron_config(config, fuse_accumulation=kernels and bf16)
        cut = stage_blocks(config, vocabulary)
        mine = cut[layout.pipeline_rank :: layout.pipeline_size]
        stages = [Decoder(config, megatron, vocabulary, blocks) for blocks in mine]
        for stage in stages:
            stage.to(layout.device)
        if draws:
            draw_together(named_parameters(stages), config.run.seed, layout)
        of_run = curriculum(config)
        if kernels:
            columns = vocabulary // layout.tensor_size if stages[-1].is_last else 0
            for own in {own.sequence_length: own for own in of_run}.values():
                check_kernels(at_stage(config, own), columns, layout.device)
        optimizer = LevelOptimizer(config, levels, stages, vocabulary, megatron, layout)
        busy, clock = BusyTime(layout.device), WaitClock(layout.device)
        return cls(config, layout, levels, stages, optimizer, busy, clock, of_run)

    def take_step(
        self,
        batches: list[Batch],
        requests: Requests | None = None,
        before_update: Callable[[], None] | None = None,
    ) -> tuple[Verdict, dict[int, dict[str, float | None]]]:
        """One step on this rank's micro batches: what all ranks saw of it, what was updated.

        A step that is not admitted enters no window; one in which no target counts is admitted, has
        no loss, and adds nothing to them. A window that is due closes all the same,
        with the steps that it holds. The device decides that by itself: the host learns of it when
        all of the step is under way, and waits for nothing before.

        Args:
            batches: of this rank, from `nlscale.train.batches.StepReader` or the like.
            requests: what this rank asks of all of them.
            before_update: called once the ranks have agreed: what the step sends between nodes has
                arrived, and nothing is updated.
        """
        counters = self.counters
        self.clock.begin()
        counters.step += 1
        counters.samples += stage_of(self.curriculum, counters.step).global_batch
        read_ahead(self.optimizer.groups, counters.step)
        self.optimizer.start_step(counters.step)
        with doing("forward and backward pass"):
            by_source = sums_by_source(batches)
            stages = self.asked or self.stages
            seen = run_micro_batches(stages, batches, self.optimizer.windows, by_source)
        self.busy.stop()
        with doing("reduction inside the node"):
            self.optimizer.finish_backward()
        with doing("reduction across nodes"):
            finite = self.optimizer.finish_crossing()
        with doing("consensus"):
            limit = self._highest_loss()
            squares = self.optimizer.squares
            consensus = agree(self.layout, *seen, finite, requests, limit, by_source, squares)
        if before_update is not None:
            before_update()
        with doing("update of the levels due"):
            update = self.optimizer.update(counters.step, consensus)
        with doing("waiting for the GPU"):
            verdict = consensus.read()
            updated = self.optimizer.conclude(update, verdict)
            self.waits = self.clock.end(link=self.optimizer.link_seconds())
        self._count(verdict)
        return verdict, updated

    def to_batch(
        self,
        rows: NDArray[np.int64],
        separator: int,
        counted: int,
        counts: NDArray[np.bool_] | None = None,
        sources: tuple[NDArray[np.int64], int] | None = None,
    ) -> Batch:
        """A micro batch of samples, [rows, sequence + 1]: the last token of each is only a target.

        Args:
            rows: token ids.
            separator: the token that ends a document, where `data.document_mask` tells them apart.
            counted: the first rows, whose loss counts.
            counts: of the tokens, which count as targets, [rows, sequence + 1]; None: all.
            sources: of each row the place of its source, [rows], and how many sources there are;
                None: the data are no mixture. All rows are counted then.
        """
        device, documents, mask, own = self.layout.device, None, None, None
        if self.config.data.document_mask:
            chunk = document_chunk(self.config)
            targets = None if counts is None else counts[:, 1:]
            others = {each.chunk for each in in_context(self.config, ContextObjective.local)}
            documents = Documents.of(rows[:, :-1], separator, chunk, device, targets, others)
        if counts is not None:
            mask = LossMask.of(counts[:, 1:], counted, device)
        if sources is not None:
            length, targets = rows.shape[1] - 1, None if counts is None else counts[:, 1:]
            own = RowSources.of(*sources, targets, length, device)
        tokens = to_device(rows, device)
        return Batch(tokens[:, :-1], tokens[:, 1:], counted, documents, mask, own)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by their names in the whole model."""
        return named_parameters(self.stages)

    def shards(self) -> list[Shard]:
        """What this rank holds of its parameters' optimizer state."""
        return shards(self.optimizer, self.named_parameters())

    def windows(self) -> list[WindowShard]:
        """What this rank holds of its parameters' windows."""
        return window_shards(self.optimizer, self.named_parameters())

    def owed(self) -> list[OwedShard]:
        """What this rank's windows still owe."""
        return owed_shards(self.optimizer, self.named_parameters())

    def _count(self, verdict: Verdict) -> None:
        counters = self.counters
        sent, saved = self.optimizer.traffic()
        counters.bytes_sent += sent
        counters.bytes_saved += saved
        if math.isfinite(verdict.loss) and counters.first_loss is None:
            counters.first_loss = verdict.loss
        if not verdict.admitted:
            counters.dropped += 1
            counters.dropped_in_a_row += 1
            return
        counters.tokens += verdict.tokens
        counters.counted_tokens += verdict.counted_tokens
        counters.dropped_in_a_row = 0
        if not verdict.counted_tokens:  # there is no loss
            return
        counters.recent = [*counters.recent[1 - _SPIKE_MEMORY :], verdict.loss]
        averaged = max(1, self.config.train.steps // 20)
        counters.last_losses = [*counters.last_losses, verdict.loss][-averaged:]

    def _highest_loss(self) -> float:
        """Above it a loss is out of line with the steps before it (train.drop_spikes)."""
        limit, recent = self.config.train.drop_spikes, self.counters.recent
        enough = len(recent) >= _SPIKE_MEMORY // 5
        return limit * statistics.median(recent) if limit is not None and enough else math.inf
