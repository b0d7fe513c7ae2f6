"""Process groups: who holds which part of the model, and which ranks share a node."""

from __future__ import annotations

import datetime
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from nlscale.cluster.life.place import Place, place
from nlscale.cluster.life.rendezvous import Told, meet
from nlscale.cluster.life.watch import Watch, doing
from nlscale.cluster.spread import nodes_of_a_data_group
from nlscale.config.keys import to_plain
from nlscale.config.vocabulary import Config, ParallelConfig, Sharding
from nlscale.errors import UserError
from nlscale.parallel import cpu
from nlscale.parallel.gloo import one_device

_WATCH_SPEAKS_FIRST_SECONDS = 60.0


@dataclass(frozen=True)
class Layout:
    """This rank's place. Groups are megatron-core's, hierarchical over nodes."""

    rank: int
    world: int
    device: torch.device
    data_rank: int
    data_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    node_rank: int
    """Which of the nodes that the data-parallel group spans this rank is on."""
    nodes: int
    """Nodes a data-parallel group spans."""
    all_nodes: int
    """Nodes of the run."""
    within_node: ProcessGroupCollection
    """Where a gradient buffer is sharded: the data-parallel ranks of one node."""
    tensor_group: dist.ProcessGroup
    """The ranks that share every layer."""
    across_nodes: dist.ProcessGroup | None
    """The ranks that hold the same shard on each node; None on one node."""
    host: dist.ProcessGroup
    """All ranks over gloo, for what goes on beside the training: writing checkpoints."""
    replica: dist.ProcessGroup
    """All ranks of one copy of the optimizer state: its tensor, pipeline and within-node ranks;
    with `parallel.shard_optimizer` all or matrices the run's."""
    matrices: dist.ProcessGroup | None
    """The ranks that together hold the optimizer's state of this pipeline stage: its tensor and
    within-node ranks; with `parallel.shard_optimizer=all` those of all nodes. None: this rank."""
    hosts: tuple[str, ...]
    """Name of the host of each rank."""

    @property
    def is_writer(self) -> bool:
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether this rank reports the loss of its data-parallel rank: it sees it, alone."""
        return self.tensor_rank == 0 and self.pipeline_rank == self.pipeline_size - 1


def _nothing(reason: str) -> None:
    pass


@contextmanager
def process_groups(
    config: Config, on_end: Callable[[str], None] = _nothing, told: Told | None = None
) -> Iterator[Layout]:
    """Start the process groups of a run and watch over its ranks; end them whatever happens.

    Args:
        config: the run.
        on_end: see `nlscale.cluster.life.watch.Watch`.
        told: what else all ranks must be told alike, such as the fingerprint of the data; the
            configuration is compared anyhow, but for what a node may have at a place of its own.

    Raises:
        LostRank: a rank did not come, was lost or hangs, now or while the body ran.
        SaidElsewhere: the body failed because of what another rank has said.
        UserError: the ranks do not fit the configuration or this machine, or were told different
            things.
    """
    cpu.install()
    started_here = not dist.is_initialized()
    timeouts = config.timeouts
    longest = max(timeouts.startup, timeouts.step, timeouts.checkpoint)
    # of every group: whichever a rank waits in, the watch is to say first what for
    timeout = datetime.timedelta(seconds=longest + _WATCH_SPEAKS_FIRST_SECONDS)
    with ExitStack() as ends:
        with one_device():
            if started_here:
                _join(config, on_end, _told(config, told or {}), timeout, ends)
            ends.callback(parallel_state.destroy_model_parallel)
            layout = _layout(config.parallel, timeout)
        yield layout


def _join(
    config: Config,
    on_end: Callable[[str], None],
    told: Told,
    timeout: datetime.timedelta,
    ends: ExitStack,
) -> None:
    timeouts, here = config.timeouts, place()
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        take_gpu(here)
    _check_numbering(config.parallel, here)
    meeting = meet(timeouts.startup, told) if here.meets else None
    store = meeting.store if meeting else dist.HashStore()
    watched = meeting if here.world > 1 else None
    watch = ends.enter_context(Watch(watched, timeouts, on_end)) if watched else None
    telling = watch.telling if watch else nullcontext
    with telling(), doing("connecting the ranks"):
        dist.init_process_group(
            backend, store=store, rank=here.rank, world_size=here.world, timeout=timeout
        )
    ends.callback(dist.destroy_process_group)
    ends.enter_context(telling())


def _told(config: Config, more: Told) -> Told:
    """What every rank must have been told alike.

    The folders of the data may be at another place on each node, as copies on local disks are.
    """
    plain = to_plain(config)
    data = plain["data"]
    stages = [source for stage in data["stages"] for source in stage["mixture"]]
    for source in [data, *data["mixture"], *stages]:
        del source["dir"]
    return {
        "ranks of a node": config.parallel.ranks_per_node or place().local_world,
        **plain,
        **more,
    }


def take_gpu(here: Place) -> None:
    """Take the GPU of this rank's number on its node.

    Raises:
        UserError: it sees fewer.
    """
    seen = torch.cuda.device_count()
    if here.local_rank >= seen:
        raise UserError(
            f"LOCAL_RANK={here.local_rank} has no GPU: this process sees {seen} on "
            f"{socket.gethostname()}; start at most one rank a GPU, and let each see all of its "
            f"node's (CUDA_VISIBLE_DEVICES, Slurm's --gpu-bind and --gpus-per-task hide some)"
        )
    torch.cuda.set_device(here.local_rank)


def _check_numbering(parallel: ParallelConfig, here: Place) -> None:
    """Refuse ranks that are not numbered node after node, as the groups of a node take them to be.

    They would compute the same, and send between the nodes what should stay in one.
    """
    if parallel.ranks_per_node or here.rank % here.local_world == here.local_rank:
        return
    error = UserError(
        f"{here.who} is LOCAL_RANK={here.local_rank} of LOCAL_WORLD_SIZE={here.local_world}, and "
        f"would be {here.rank % here.local_world} if ranks were numbered node after node; use "
        f"srun --distribution=block, or the same number of ranks on each node"
    )
    error.told = True
    raise error


def _layout(parallel: ParallelConfig, timeout: datetime.timedelta) -> Layout:
    tensor, pipeline = parallel.tensor, parallel.pipeline
    virtual = parallel.virtual_stages
    per_node = parallel.ranks_per_node or _ranks_here()
    nodes = nodes_of_a_data_group(dist.get_world_size(), per_node, tensor, pipeline)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        num_distributed_optimizer_instances=nodes,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout / datetime.timedelta(minutes=1),
    )
    inside = parallel_state.get_data_parallel_group(
        with_context_parallel=True, partial_data_parallel=True
    )
    across = parallel_state.get_inter_distributed_optimizer_instance_group() if nodes > 1 else None
    groups = ProcessGroupCollection()
    groups.dp = groups.dp_cp = groups.intra_dp_cp = groups.intra_dist_opt = inside
    groups.expt_dp = groups.intra_expt_dp = inside  # unused: there are no experts
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.ep = parallel_state.get_expert_model_parallel_group()
    groups.mp = parallel_state.get_model_parallel_group()
    host = dist.new_group(backend="gloo", timeout=timeout)
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname(), group=host)
    return Layout(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        device=torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu"),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=tensor,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=pipeline,
        node_rank=dist.get_rank(across) if across is not None else 0,
        nodes=nodes,
        all_nodes=dist.get_world_size() // per_node,
        within_node=groups,
        tensor_group=groups.tp,
        across_nodes=across,
        host=host,
        replica=_replica(parallel.shard_optimizer),
        matrices=_matrices(across, parallel.shard_optimizer, host, timeout),
        hosts=tuple(hosts),
    )


def _replica(sharding: Sharding) -> dist.ProcessGroup:
    whole: dist.ProcessGroup | None = dist.group.WORLD
    if sharding == Sharding.node:
        whole = parallel_state.get_intra_distributed_optimizer_instance_group()
    assert whole is not None
    return whole


def _matrices(
    across: dist.ProcessGroup | None,
    sharding: Sharding,
    host: dist.ProcessGroup,
    timeout: datetime.timedelta,
) -> dist.ProcessGroup | None:
    """The group of ranks of one stage, on one node or on all that share the optimizer's state."""
    spread = across is None or sharding == Sharding.all
    node = 0 if spread else dist.get_rank(across)
    places: list[tuple[int, int]] = [(0, 0)] * dist.get_world_size()
    mine = (parallel_state.get_pipeline_model_parallel_rank(), node)
    dist.all_gather_object(places, mine, group=host)
    ranks = [[r for r, p in enumerate(places) if p == place] for place in sorted(set(places))]
    if len(ranks[0]) == 1:
        return None
    found, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout)
    return found  # type: ignore[no-any-return]


def _ranks_here() -> int:
    """Ranks on this node, as who started them says; of a process that is alone, all."""
    here = place()
    return here.local_world if here.meets else dist.get_world_size()
