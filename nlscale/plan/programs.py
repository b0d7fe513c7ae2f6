"""Whether a micro batch fills a GPU: programs of a memory's serial passes, columns of the loss.

A memory is written chunk after chunk: those passes run one program a sequence and head of this
rank, each on a multiprocessor of its own and as long as the sequence is, however few they are. An
H100 has 132 multiprocessors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from nlscale.config.curriculum import curriculum
from nlscale.config.vocabulary import Config
from nlscale.errors import UserError
from nlscale.model.mixers.facts import MicroBatch
from nlscale.model.pattern import block_kinds
from nlscale.plan.pipeline import pipeline

WANTED = 128
"""Programs that occupy a GPU: with a half of them half of it waits."""
ALIGNED = 16
"""Logits of a row, that the loss reads at once where each row has a multiple of them."""


def serial_programs(config: Config) -> int | None:
    """Programs of the serial passes of a micro batch; None where no kernels have such passes."""
    found = [kind.facts.serial_programs(MicroBatch(kind.config)) for kind in block_kinds(config)]
    return min((programs for programs in found if programs is not None), default=None)


def advise(
    config: Config, vocabulary: int, data_parallel: int, fits: Callable[[Config], bool]
) -> list[str]:
    """What would use the GPUs better, a sentence each.

    Args:
        config: the run.
        vocabulary: token ids of the model.
        data_parallel: ranks that share a batch.
        fits: whether a run has the memory; it may raise UserError of sizes that do not divide.
    """
    said = []
    programs = serial_programs(config)
    if programs is not None and programs < WANTED:
        larger = _larger_micro_batch(config, fits)
        better = "no larger train.micro_batch fits"
        if larger is not None:
            better = f"train.micro_batch={larger} runs {_programs_of(config, larger)} and fits"
            better += _wait(config, vocabulary, larger, data_parallel)
        said.append(f"{programs} programs leave most of a GPU without work: {better}")
    for kind in block_kinds(config):
        advice = kind.facts.advice(MicroBatch(kind.config))
        said += [sentence for sentence in advice if sentence not in said]
    tensor = config.parallel.tensor
    if MicroBatch(config).half_kernels and vocabulary % (tensor * ALIGNED):
        whole = tensor * ALIGNED
        said.append(
            f"the {vocabulary // tensor:,} logits of a row are no multiple of {ALIGNED}, which "
            f"makes the loss about 1.8 times slower; use "
            f"model.vocabulary={-(-vocabulary // whole) * whole}"
        )
    return said


def _larger_micro_batch(config: Config, fits: Callable[[Config], bool]) -> int | None:
    """The smallest that fits and fills a GPU, else the largest that fits; None: none."""
    best, batches = None, [stage.global_batch for stage in curriculum(config)]
    for size in range(config.train.micro_batch + 1, min(batches) + 1):
        if any(batch % size for batch in batches):
            continue
        try:
            if not fits(_with(config, size)):
                break  # nor do larger ones
        except UserError:
            continue
        best = size
        if _programs_of(config, size) >= WANTED:
            break
    return best


def _wait(config: Config, vocabulary: int, micro_batch: int, data_parallel: int) -> str:
    """What a pipeline loses by fewer micro batches, where it has fewest."""
    if config.parallel.pipeline == 1:
        return ""
    fewest = min(stage.global_batch for stage in curriculum(config))
    micro_batches = fewest // (micro_batch * data_parallel)
    bubble = pipeline(config, vocabulary, micro_batches).bubble
    return f"; a rank of the pipeline then waits {bubble:.1%} of a step"


def _programs_of(config: Config, micro_batch: int) -> int:
    return serial_programs(_with(config, micro_batch)) or 0


def _with(config: Config, micro_batch: int) -> Config:
    return replace(config, train=replace(config.train, micro_batch=micro_batch))
