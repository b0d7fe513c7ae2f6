"""Floating-point operations of training, from the configuration alone: "model FLOPs".

Forward and backward pass of what the model computes; a multiply-add is 2. Counted are the matrix
products, the short convolutions and the triangular inverses of the memory. Left out are elementwise
work (norms, gates, SiLU, softmax, loss: below 1 % from a width of 512 on, by estimate), lookups in
the embedding, the optimizer, and whatever is computed twice: `train.recompute`, and what a fused
kernel does again in its backward pass. So model FLOPs a second, over what the hardware can do, is
model FLOPs utilisation (MFU) as Chowdhery et al. 2022 (PaLM, appendix B) mean it.

Softmax attention **[choice]** counts the pairs that a causal mask leaves, (T + 1) / 2 keys a token,
which is what fused kernels compute. PaLM's and Chinchilla's formulas take all T of them: their MFU
is higher for the same speed, and attention would look dearer beside a memory than it is.

The memory counts the chunk form of `nlscale.ops.memory.chunk`, whole squares within a chunk;
kernels of the same form count the same. tests/model compares all of it with what a profiler counts
in a real forward and backward pass.
"""

from __future__ import annotations

from nlscale.config.curriculum import at_stage, curriculum, lengths, total_tokens
from nlscale.config.in_context import in_context
from nlscale.config.vocabulary import Config, ContextObjective
from nlscale.model.mixers.facts import PASSES
from nlscale.model.pattern import block_kinds
from nlscale.model.sizes import CONTEXT_WINDOW, level_hidden


def flops_per_token(config: Config, vocabulary: int) -> float:
    """FLOPs of a training token, forward and backward, over the whole model.

    Args:
        config: the run; sequence length, chunk and mixer matter beside the sizes, the layout does
            not.
        vocabulary: token ids of the model.
    """
    return sum(flops_by_part(config, vocabulary).values())


def steps_flops(config: Config, vocabulary: int, after: int, until: int) -> float:
    """FLOPs of the steps of a run that come after one and up to another, each at its own stage."""
    return sum(
        max(0, min(until, stage.first_step + stage.steps) - max(after, stage.first_step))
        * stage.tokens_per_step
        * flops_per_token(at_stage(config, stage), vocabulary)
        for stage in curriculum(config)
    )


def mean_flops_per_token(config: Config, vocabulary: int) -> float:
    """FLOPs of a training token, the mean over a run."""
    stages = curriculum(config)
    if len(lengths(stages)) == 1:
        return flops_per_token(config, vocabulary)
    return steps_flops(config, vocabulary, 0, config.train.steps) / total_tokens(config)


def flops_by_part(config: Config, vocabulary: int) -> dict[str, float]:
    """The same by part: those of the mixer, `levels`, `head`.

    Of the mixers, `projections` are those into and out of them, and the rest is their own:
    `convolution` and `memory`, or `attention`. `levels` are the MLPs of the CMS, and what changes
    them inside the context.
    """
    model = config.model
    parts: dict[str, float] = {}
    for kind in block_kinds(config):
        for name, flops in kind.facts.flops(kind.config).items():
            parts[name] = parts.get(name, 0.0) + len(kind.depths) * flops
    of_levels = float(PASSES * 2 * 3 * model.d_model * sum(level_hidden(config)))
    parts["levels"] = model.layers * of_levels + in_context_flops(config)
    return parts | {"head": float(PASSES * 2 * model.d_model * vocabulary)}


def in_context_flops(config: Config) -> float:
    """Of the changes of MLPs inside the context, a token: their targets, the sums of the chunks
    that are read from, and the products with those."""
    d, length, found = config.model.d_model, config.data.sequence_length, 0.0
    widths = level_hidden(config)
    for each in in_context(config, ContextObjective.local):
        chunks = -(-length // each.chunk)
        # whole chunks, of which the first reads nothing and the last is not read
        scanned = 2 * 2 * d * widths[each.level] * (chunks - 1) * each.chunk / length
        found += PASSES * len(each.depths) * (2 * d * d + 2 * CONTEXT_WINDOW * d + scanned)
    return found
