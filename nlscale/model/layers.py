"""The tensor-parallel building blocks: megatron-core's layers, with our initialisation and norm.

Other files of the model name megatron-core for its configuration alone. Tensors are
[sequence, batch, hidden].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.parallel_state import (
    get_tensor_model_parallel_group,
    get_tensor_model_parallel_rank,
)
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    mappings,
)
from megatron.core.tensor_parallel import layers as tensor_parallel_layers
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nlscale.config.vocabulary import Config, Dtype
from nlscale.model.init import Initializer, normal, ones, tag
from nlscale.ops import pointwise
from nlscale.ops.accumulate import accumulate_product_
from nlscale.ops.by_hand import Norm
from nlscale.ops.pointwise import compiled_on_gpu


class _WeightGradients:
    """What megatron-core calls to add a weight's gradient to its buffer: apex's, where it is."""

    @staticmethod
    def wgrad_gemm_accum_fp32(x: Tensor, d_output: Tensor, buffer: Tensor) -> None:
        accumulate_product_(buffer, d_output, x)


# It looks for apex's extension under this name, once, when it is imported.
_megatron: Any = tensor_parallel_layers
_megatron.fused_weight_gradient_mlp_cuda = _WeightGradients
_megatron._grad_accum_fusion_available = True


def megatron_config(config: Config, fuse_accumulation: bool = False) -> TransformerConfig:
    """What megatron-core's layers and schedules need to know of the run.

    The loss is a sum over tokens (`calculate_per_token_loss`): windows are divided by their
    token count only when they are applied (docs/concepts/windows.md).

    Args:
        config: the run.
        fuse_accumulation: products add the gradients of weights to the fp32 buffers themselves,
            which megatron-core's DDP must have given them before the first forward pass.
    """
    bf16, parallel = config.train.dtype == Dtype.bf16, config.parallel
    interleaved = parallel.virtual_stages > 1
    return TransformerConfig(
        num_layers=parallel.pipeline * parallel.virtual_stages,  # ours are cut by model.stages
        hidden_size=config.model.d_model,
        num_attention_heads=config.model.heads,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_stages if interleaved else None,
        # Interleaved over two ranks, both neighbours are the same rank: a batch of sends to it
        # would mix up activations and gradients.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # True: the host waits for the whole device after each exchange, as old versions of torch
        # needed.
        batch_p2p_sync=False,
        sequence_parallel=parallel.sequence,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
        bf16=bf16,
        use_cpu_initialization=True,
        perform_initialization=False,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=fuse_accumulation,
    )


def column_linear(
    megatron: TransformerConfig,
    inputs: int,
    outputs: Sequence[int],
    init: Initializer,
    width_multiplier: float = 1.0,
    matrix: bool = True,
) -> ColumnParallelLinear:
    """y = x W^T with the rows of W split over the tensor-parallel group.

    Outputs of these sizes are stacked in W; each is split by itself, so that a rank holds the same
    part of every one, and is a matrix of its own (`nlscale.model.init.tag`).
    """
    layer = ColumnParallelLinear(
        inputs, sum(outputs), config=megatron, init_method=_unused, bias=False, gather_output=False
    )
    tag(layer.weight, init, 0, sections=outputs, width_multiplier=width_multiplier, matrix=matrix)
    return layer


def row_linear(
    megatron: TransformerConfig,
    inputs: int,
    outputs: int,
    init: Initializer,
    width_multiplier: float = 1.0,
) -> RowParallelLinear:
    """y = sum over the tensor-parallel group of x_part W_part^T: one reduction."""
    layer = RowParallelLinear(
        inputs,
        outputs,
        config=megatron,
        init_method=_unused,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=True,
    )
    tag(layer.weight, init, 1, width_multiplier=width_multiplier, matrix=True)
    return layer


def own_heads(heads: int) -> range:
    """Which heads of the model this rank holds; each of the tensor-parallel group so many."""
    first = heads * get_tensor_model_parallel_rank()
    return range(first, first + heads)


def gather_input(megatron: TransformerConfig, x: Tensor) -> Tensor:
    """The input side of `column_linear` alone, for several products of one input.

    Gathers the sequence where it is split; the gradient is summed over the tensor-parallel group.
    """
    if megatron.sequence_parallel:
        return mappings.gather_from_sequence_parallel_region(x)
    return mappings.copy_to_tensor_model_parallel_region(x)


def product(layer: ColumnParallelLinear | RowParallelLinear, x: Tensor) -> Tensor:
    """The product x W^T of `column_linear` or `row_linear` alone, without communication."""
    return tensor_parallel_layers.linear_with_grad_accumulation_and_async_allreduce(
        input=x,
        weight=layer.weight,
        bias=None,
        gradient_accumulation_fusion=layer.gradient_accumulation_fusion,
        allreduce_dgrad=False,
        sequence_parallel=False,
        tp_group=get_tensor_model_parallel_group(),
    )


def gather_channels(x: Tensor) -> Tensor:
    """All outputs of `column_linear`, of which this rank has a part; a rank may use them for a part
    of the result alone: the gradient is summed over the tensor-parallel group."""
    return mappings.all_gather_last_dim_from_tensor_parallel_region(x)


def reduce_output(megatron: TransformerConfig, partial: Tensor) -> Tensor:
    """The reduction of `row_linear` alone, for a sum of several partial products."""
    reduce: Callable[[Tensor], Tensor] = (
        mappings.reduce_scatter_to_sequence_parallel_region
        if megatron.sequence_parallel
        else mappings.reduce_from_tensor_model_parallel_region
    )
    return reduce(partial)


def embedding(megatron: TransformerConfig, vocabulary: int, std: float) -> VocabParallelEmbedding:
    """Token embedding with the vocabulary split over the tensor-parallel group."""
    layer = VocabParallelEmbedding(
        vocabulary, megatron.hidden_size, init_method=_unused, config=megatron,
        reduce_scatter_embeddings=megatron.sequence_parallel,
    )  # fmt: skip
    tag(layer.weight, normal(std), partition_dim=0)
    return layer


def head(
    megatron: TransformerConfig,
    vocabulary: int,
    std: float,
    tied: VocabParallelEmbedding | None = None,
) -> ColumnParallelLinear:
    """Logits, with the vocabulary split over the tensor-parallel group.

    Tied, it has no weight of its own: it is called with that of the embedding, whose gradient is
    the sum of both uses.
    """
    if tied is None:
        return column_linear(
            megatron, megatron.hidden_size, [vocabulary], normal(std), matrix=False
        )
    # The product adds its gradient to the buffer by itself, the lookup by way of autograd; with
    # this megatron-core takes both.
    carrier: Any = tied.weight
    carrier.zero_out_wgrad = True
    return ColumnParallelLinear(
        megatron.hidden_size, vocabulary, config=megatron, init_method=_unused, bias=False,
        gather_output=False, skip_weight_param_allocation=True,
    )  # fmt: skip


def vocabulary_group() -> dist.ProcessGroup:
    """The ranks that share the rows of the embedding and of the head."""
    return get_tensor_model_parallel_group()


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight along the last dimension, in fp32.

    `after` is the norm of a residual stream, in which the last update may not have been added yet.
    Of heads, which are split over the tensor-parallel group, it has one weight for all.
    """

    def __init__(
        self,
        megatron: TransformerConfig,
        size: int,
        eps: float,
        kernels: bool,
        of_heads: bool = False,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=megatron.params_dtype))
        self.by_hand = kernels
        self.add_and_norm = compiled_on_gpu(pointwise.add_and_norm, kernels)
        split = megatron.sequence_parallel
        if of_heads:
            split = megatron.tensor_model_parallel_size > 1
        tag(self.weight, ones, partial_gradient=split)

    def forward(self, x: Tensor) -> Tensor:
        if self.by_hand and not x.is_cuda:
            return Norm.apply(x, None, self.weight, self.eps)  # type: ignore[no-any-return]
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def after(self, x: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + update, and the norm of that."""
        if update is None:
            return x, self(x)
        return self.add_and_norm(x, update, self.weight, self.eps)


def recomputed(function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs), keeping only the inputs for the backward pass."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def remade(tensors: Sequence[Tensor], again: Callable[[], Sequence[Tensor]]) -> Iterator[None]:
    """Within, autograd keeps none of these tensors; in the backward pass `again()` makes them.

    For what small operations make of something larger that is kept anyway.
    """

    def key(x: Tensor) -> tuple[Any, ...]:
        return x.data_ptr(), x.shape, x.stride()

    places = {key(x): place for place, x in enumerate(tensors)}
    made: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor | int:
        return places.get(key(x), x)

    def unpack(packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if packed not in made:
            with torch.no_grad():
                made.update(enumerate(again()))
        return made.pop(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _unused(weight: Tensor) -> None:
    raise AssertionError("weights are set by nlscale.model.init.initialize")
