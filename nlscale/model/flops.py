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

The memory counts the chunk form of `nlscale.ops.chunk`, whole squares within a chunk; kernels of
the same form count the same. tests/model compares all of it with what a profiler counts in a real
forward and backward pass.
"""

from __future__ import annotations

from nlscale.config import Config, Mixer
from nlscale.model.sizes import head_dim, level_hidden

_PASSES = 3
"""Forward, and twice that backward: a product is differentiated by both of its factors."""


def flops_per_token(config: Config, vocabulary: int) -> float:
    """FLOPs of a training token, forward and backward, over the whole model.

    Args:
        config: the run; sequence length, chunk and mixer matter beside the sizes, the layout does
            not.
        vocabulary: token ids of the model.
    """
    return sum(flops_by_part(config, vocabulary).values())


def flops_by_part(config: Config, vocabulary: int) -> dict[str, float]:
    """The same by part: `projections`, `convolution`, `memory`, `attention`, `levels`, `head`.

    `projections` are those into and out of the mixers, `levels` the MLPs of the CMS; a part that
    the mixer does not have is left out.
    """
    model = config.model
    parts = {"projections": float(_PASSES * 2 * model.d_model * _projected(config))}
    if model.mixer == Mixer.attention:
        parts["attention"] = _attention(config)
    else:
        channels = (2 if model.memory.separate_inputs else 1) * model.d_model
        parts["convolution"] = float(_PASSES * 2 * model.memory.convolution * channels)
        parts["memory"] = model.heads * _memory(config)
    parts["levels"] = float(_PASSES * 2 * 3 * model.d_model * sum(level_hidden(config)))
    parts = {name: model.layers * flops for name, flops in parts.items()}
    return parts | {"head": float(_PASSES * 2 * model.d_model * vocabulary)}


def _projected(config: Config) -> int:
    """Columns of the projections of one mixer, the output's included."""
    model, memory = config.model, config.model.memory
    if model.mixer == Mixer.attention:
        return 4 * model.d_model
    sections = (2 if memory.separate_inputs else 1) + 2 + bool(memory.output_gate)
    return sections * model.d_model + 2 * model.heads * bool(memory.static_gates)


def _attention(config: Config) -> float:
    """Scores and the sum of the values, a token of one layer."""
    keys = (config.data.sequence_length + 1) / 2
    return _PASSES * 2 * 2 * keys * config.model.d_model


def _memory(config: Config) -> float:
    """The memory of one head, a token."""
    model, length = config.model, config.data.sequence_length
    whole, rest = divmod(length, model.memory.chunk)
    flops = whole * _chunk(config, model.memory.chunk) + (_chunk(config, rest) if rest else 0)
    read_off = model.mixer in (Mixer.hope_pure, Mixer.hope_paper)  # M_m times what is read
    return flops / length + _PASSES * 2 * head_dim(model) ** 2 * read_off


def _chunk(config: Config, size: int) -> int:
    """One chunk of `size` tokens of one head, in the notation of `nlscale.ops.chunk`."""
    mixer, d = config.model.mixer, head_dim(config.model)
    own_state = mixer in (Mixer.hope, Mixer.gated_delta)
    modifies_itself = mixer != Mixer.gated_delta
    rows = d * (own_state + modifies_itself)
    products = size * size * d  # k k^T
    products += size * size * rows + size * rows * d  # T diag(r) X, and Z' = ... + D^T n
    products += 2 * size * size * d + size * d * d  # the read: q k^T, A D, q Z^T
    if own_state:
        products += size * d * d  # f Z^T
    if modifies_itself:
        products += d * d * (d + 2) + d**3  # what makes keys with gates, and values, now
        products += size * d * (d + 2) + size * d * d  # keys with gates; values
        products += size * d * d  # (u - c k - f) P^T
    inverse = size**3  # T, forward only: its derivative is made of products with T
    decays = 2 * size * (size + 1)  # derivatives of the decays are summed by a product, backward
    return _PASSES * 2 * products + inverse + decays
