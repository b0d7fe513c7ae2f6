"""The optimizer of a sync group: a rule over the shards of a node, by megatron-core."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from megatron.core.distributed.param_and_grad_buffer import shard_buffer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer, Range
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nlscale.config.vocabulary import Config, Dtype, OptimizerConfig, WireFormat
from nlscale.levels.exchange import MatrixExchange, MatrixRange
from nlscale.levels.homes import Cut
from nlscale.levels.host_tier import HostTier
from nlscale.levels.spectrum import Level, SyncGroup, sync_group
from nlscale.levels.tiers import MakesTier
from nlscale.levels.window import Window, bucket_range
from nlscale.levels.wire import Wire
from nlscale.model.decoder import Decoder, depth_of
from nlscale.model.width import width_multiplier
from nlscale.optim.table import rule
from nlscale.parallel import cpu
from nlscale.parallel.layout import Layout


class ShardedOptimizer(DistributedOptimizer):
    """megatron-core's, with one launch for what it copies parameter by parameter.

    It has a range of each bucket for each data-parallel rank of a node; here that can be a part of
    that range, where the other nodes have the others (`nlscale.levels.wire.Wire.owned`).
    """

    def __init__(self, wire: Wire, *args: Any, **kwargs: Any) -> None:
        self._wire = wire
        self.tier: HostTier | None = None
        """Where the shards lie between updates; None: on the device."""
        super().__init__(*args, **kwargs)

    def _build_gbuf_range_map(self, param_and_grad_buffer: Any) -> dict[Any, list[Any]]:
        buffer = param_and_grad_buffer
        ranges = [self._owned_map(buffer, bucket) for bucket in buffer.buckets]
        return {(buffer.param_dtype, buffer.grad_dtype): ranges}

    def held(self) -> Iterator[tuple[nn.Parameter, int, Any]]:
        """Of each parameter of which this rank holds a range: where that begins in its flattened
        part, and the fp32 range that the inner optimizer updates."""
        self.settle()
        for parameter, (index, order) in self.model_param_group_index_map.items():
            buffer, dtype, bucket = self.model_param_gbuf_map[parameter]
            ranges = self.gbuf_ranges[buffer][dtype][bucket]["param_map"][parameter]
            values = self.optimizer.param_groups[index]["params"][order]
            yield parameter, ranges["param"].start, values

    def held_in_node(self, buffer: int, bucket: int) -> dict[nn.Parameter, Any]:
        """The ranges of parameters in this rank's part of a bucket, whatever other nodes have."""
        bucket = self.buffers[buffer].buckets[bucket]
        begin, end = bucket_range(bucket, self.data_parallel_group)
        return self._range_map(self.buffers[buffer], bucket, begin, end)

    def _owned_map(self, buffer: Any, bucket: Any) -> dict[str, Any]:
        """As megatron-core's `_build_model_gbuf_range`, of what this node has of the rank's range;
        a node has no more than one range of a parameter."""
        begin, end = bucket_range(bucket, buffer.data_parallel_group)
        own: dict[nn.Parameter, Any] = {}
        for each in self._wire.owned(self._wire.cut(buffer, bucket, begin, end), end - begin):
            own |= self._range_map(buffer, bucket, begin + each.start, begin + each.stop)
        return {"param_map": own}

    def _range_map(self, buffer: Any, bucket: Any, begin: int, end: int) -> dict[nn.Parameter, Any]:
        return self._build_model_gbuf_param_range_map(  # type: ignore[no-any-return]
            buffer.param_index_map, Range(begin, end), bucket.offset
        )

    def _copy_model_grads_to_main_grads(self) -> None:
        if self.tier is None:
            super()._copy_model_grads_to_main_grads()
            return
        for models, mains in self._pairs:
            for model, main in zip(models, mains, strict=True):
                own = self._get_model_param_range_map(model)["param"]
                self.tier.gradients[main] = model.main_grad.view(-1)[own.start : own.end]

    def gradient(self, main: Any) -> Tensor:
        """Of a fp32 shard, of the group's window, once it is prepared."""
        return main.grad if self.tier is None else self.tier.gradients[main]  # type: ignore[no-any-return]

    def step_with_ready_grads(self) -> bool:
        if self.tier is None:
            return super().step_with_ready_grads()  # type: ignore[no-any-return]
        self.tier.step()
        self._wire.gather(self._parameter_shards, self._cuts)
        self._share_parameters()
        return True

    def _copy_main_params_to_model_params(self) -> None:
        if self._mains:  # of a small group a rank may have nothing
            torch._foreach_copy_(self._places, self._mains)
        self._wire.gather(self._parameter_shards, self._cuts)

    def gather_parameters(self) -> None:
        """What `step` does after the update: the ranks of the node gather each other's shards."""
        if self.tier is not None:
            self.tier.written()
        self.settle()
        self._copy_main_params_to_model_params()
        self._share_parameters()

    def _share_parameters(self) -> None:
        for ddp in self.model_chunks:
            ddp.start_param_sync()

    def settle(self) -> None:
        """Wait until the shards are what the last update has made of them, wherever they lie."""
        if self.tier is not None:
            self.tier.settle()

    def move_to_host(
        self,
        tier: MakesTier,
        group: SyncGroup,
        kept: tuple[str, ...],
        first_tensor_rank: bool,
    ) -> None:
        """Let the shards and what is kept of them lie in host memory from now on.

        Args:
            tier: makes it so.
            group: whose they are.
            kept: names of what the rule keeps of each shard.
            first_tensor_rank: whether norms count here what every tensor rank holds.
        """
        places = dict(zip(self._mains, self._places, strict=True))
        mains: list[Any] = [*places]
        counted = {p: p.tensor_model_parallel or first_tensor_rank for p in mains}
        self.tier = tier(group, self.optimizer, kept, places, counted)

    @cached_property
    def _parameter_shards(self) -> list[Tensor]:
        """What this rank holds of the buffers from which the ranks of the node gather."""
        inside = self.data_parallel_group
        return [
            shard_buffer(bucket.param_data, inside.size())[inside.rank()].view(-1)
            for buffer in self.buffers
            for bucket in buffer.buckets
        ]

    @cached_property
    def _cuts(self) -> list[Cut | None]:
        """Of each of these, what each node has."""
        return [
            self._wire.cut(buffer, bucket, *bucket_range(bucket, self.data_parallel_group))
            for buffer in self.buffers
            for bucket in buffer.buckets
        ]

    @cached_property
    def _mains(self) -> list[Tensor]:
        """This rank's fp32 shards."""
        shards = (self.shard_fp32_from_float16_groups, self.shard_fp32_groups)
        return [p for groups in shards for group in groups for p in group]

    @cached_property
    def _places(self) -> list[Tensor]:
        """Where each belongs in the buffer from which the ranks of the node gather."""
        return [self._place(p) for models, _ in self._pairs for p in models]

    @property
    def _pairs(self) -> Iterator[tuple[list[Any], list[Any]]]:
        """Parameters and their fp32 shards, in the order of `_mains`."""
        yield from zip(self.model_float16_groups, self.shard_fp32_from_float16_groups, strict=True)
        yield from zip(self.model_fp32_groups, self.shard_fp32_groups, strict=True)

    def _place(self, parameter: nn.Parameter) -> Tensor:
        index, _, bucket = self.model_param_gbuf_map[parameter]
        where = self._get_model_param_range_map(parameter)["gbuf_world_in_bucket"]
        return self.buffers[index].buckets[bucket].param_data.view(-1)[where.start : where.end]


@dataclass
class GroupOptimizer:
    """A sync group's window and the optimizer that applies it."""

    window: Window
    optimizer: ShardedOptimizer

    @property
    def group(self) -> SyncGroup:
        return self.window.group

    def keep_weights(self) -> list[Tensor]:
        """Before an update that is to be measured: copies of the weights, but of what is streamed,
        which is measured as it passes."""
        if self.optimizer.tier is None:
            return [p.detach().clone() for p in main_parameters(self)]
        self.optimizer.tier.measures = True
        return []


def main_parameters(g: GroupOptimizer) -> list[Any]:
    """This rank's fp32 parameter shards of a group, as the inner optimizer holds them."""
    return [p for group in g.optimizer.optimizer.param_groups for p in group["params"]]


def split_by_group(
    config: Config, levels: list[Level], stages: list[Decoder]
) -> dict[SyncGroup, dict[str, nn.Parameter]]:
    """The parameters of some stages by sync group, in the order of levels and phases."""
    split: dict[SyncGroup, dict[str, nn.Parameter]] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            level, depth = stage.level_and_depth(name)
            group = sync_group(levels[level], depth, config.model.layers, config.levels.stagger)
            split.setdefault(group, {})[name] = parameter
    return dict(sorted(split.items()))


def make_group_optimizer(
    group: SyncGroup,
    parameters: dict[str, nn.Parameter],
    config: Config,
    own: OptimizerConfig,
    megatron: TransformerConfig,
    layout: Layout,
    wire: Wire,
    wire_format: WireFormat,
    tier: MakesTier | None = None,
) -> GroupOptimizer:
    """The window and the optimizer of a sync group; all ranks of a stage make it alike.

    Args:
        group: the group.
        parameters: this rank's parts, by name.
        config: of the run.
        own: its `optimizer` section as it is for the level.
        megatron: what the model is made with.
        layout: this rank's place.
        wire: between the nodes.
        wire_format: how the level crosses.
        tier: moves its state to host memory; None: that stays on the device.
    """
    window = Window(group, parameters, megatron, layout, wire, wire_format, config)
    inner: Any = rule(own.rule).make(own, width_multiplier(config.model), [*parameters.values()])
    for param_group in inner.param_groups:
        param_group["decay"] = param_group["weight_decay"]  # at a period of one step
    with cpu.cuda_by_name():
        optimizer = ShardedOptimizer(
            wire,
            inner,
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=own.learning_rate,
                bf16=config.train.dtype == Dtype.bf16,
                params_dtype=megatron.params_dtype,
                use_distributed_optimizer=True,
                clip_grad=0.0,
            ),
            None,  # no loss scale: bf16 and fp32 need none
            None,
            window.ddps,
            {i: ddp.buffers for i, ddp in enumerate(window.ddps)},
            data_parallel_group=layout.within_node.dp,
            data_parallel_group_gloo=None,
            data_parallel_group_idx=0,
            distributed_optimizer_instance_id=0,
        )
    if rule(own.rule).whole_matrices:
        inner.layers = config.model.layers
        inner.exchange = _exchange(parameters, optimizer, config, layout, wire)
    if tier is not None:
        optimizer.move_to_host(tier, group, rule(own.rule).state, layout.tensor_rank == 0)
    return GroupOptimizer(window, optimizer)


def _exchange(
    parameters: dict[str, nn.Parameter],
    optimizer: ShardedOptimizer,
    config: Config,
    layout: Layout,
    wire: Wire,
) -> MatrixExchange | None:
    """How the matrices of a group become whole; None where it has none."""
    matrices: dict[str, Any] = {
        n: p for n, p in parameters.items() if _is_matrix(p) and wire.at_home(p)
    }
    if not matrices:
        return None
    held = {parameter: (start, values) for parameter, start, values in optimizer.held()}
    ranges = [MatrixRange(name, *held[p]) for name, p in matrices.items() if p in held]
    return MatrixExchange(
        matrices,
        {name: depth_of(name, config.model.layers) for name in matrices},
        ranges,
        layout.matrices,
        (layout.tensor_rank, layout.tensor_size),
        torch.bfloat16 if config.train.dtype == Dtype.bf16 else torch.float32,
        layout.node_rank,
        wire,
    )


def _is_matrix(parameter: Any) -> bool:
    return parameter.matrix  # type: ignore[no-any-return]
