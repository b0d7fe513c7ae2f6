"""A plan as a person reads it: tables of the levels and of a GPU's memory, and what they mean."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from nlscale.cluster.machines import Cluster
from nlscale.config.units import human_bytes, human_count
from nlscale.config.vocabulary import Sharding
from nlscale.levels.spectrum import INTEGER_BITS, said_periods
from nlscale.plan.host_memory import HostPlan
from nlscale.plan.memory import GIB, USABLE, RankMemory
from nlscale.plan.nvme import NvmePlan
from nlscale.plan.plan import Exposure, LevelPlan, Plan, Sharded
from nlscale.plan.programs import WANTED
from nlscale.plan.whole import WholePlan


def print_plan(plan: Plan, console: Console) -> None:
    """Print the tables, what they mean, and the warnings."""
    cluster = plan.cluster
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes > 1)} of {cluster.gpus_per_node} GPUs"
    several = len(plan.stages) > 1
    size = f"{human_count(plan.tokens_per_step)} tokens a step, {plan.steps:,} steps"
    if several:
        size = f"{human_count(plan.tokens)} tokens, {plan.steps:,} steps in stages"
    console.print(
        f"{cluster.name}: {nodes}, {cluster.inter_node_gbit:g} Gbit/s a node; "
        f"{human_count(plan.parameters)} parameters, {size}"
    )
    crosses = plan.plain > 0
    if several:
        console.print()
        console.print(_stages(plan, crosses))
        console.print()
        console.print(_explain_stages(plan))
    console.print()
    console.print(_levels(plan, crosses))
    for level in plan.levels:
        if level.outer_every is not None:
            console.print(_outer(level))
        if level.copy_rate is not None:
            console.print(
                f"Level {level.name!r} holds a copy of the next faster level's MLPs, and goes "
                f"{level.copy_rate:g} of the way to them at its updates; nothing of it crosses."
            )
    console.print()
    if plan.names_parts:
        console.print(_parts(plan))
    if crosses:
        _summarise(plan, console)
    elif cluster.nodes > 1:
        console.print("Data-parallel groups are within a node: no gradient crosses the network.")
    else:
        console.print("One node: nothing crosses the network.")
    if plan.exposure is not None:
        console.print()
        console.print(_exposure(plan, plan.exposure))
        console.print()
        _explain_exposure(plan, plan.exposure, console)
    elif crosses:
        console.print(
            "How long a step computes is not known (gpu_tflops of the cluster, for bf16), nor what "
            "of the link's time it hides; give --step-seconds."
        )
    if plan.activations:
        console.print(
            f"Beside gradients, {human_bytes(plan.activations)} of activations a step leave a node "
            f"for other pipeline ranks."
        )
    console.print()
    console.print(_memory(plan))
    console.print()
    _explain_memory(plan, console)
    if plan.host is not None:
        console.print(_host(plan.host))
    if plan.nvme is not None:
        console.print(_nvme(plan.nvme, plan.cluster, plan.fullest.computes))
    if crosses and len(plan.sharding) > 1:
        console.print(_sharding(plan))
    if plan.whole is not None:
        console.print(_whole(plan.whole))
    if plan.pipeline.ranks > 1:
        _explain_pipeline(plan, console)
    console.print(_compute(plan))
    console.print(_checkpoint(plan))
    if plan.serial_programs is not None:
        console.print(
            f"The serial passes of the memory run {plan.serial_programs} programs a micro batch, "
            f"of about {WANTED} that fill a GPU."
        )
    for advice in plan.advice:
        console.print(f"advice: {advice}")
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow")


def _compute(plan: Plan) -> str:
    total = sum(plan.flops.values())
    shares = {name: flops / total for name, flops in plan.flops.items()}
    parts = ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if share > 5e-4)
    return (
        f"A training token takes {human_count(total)} FLOPs ({parts}), the run "
        f"{plan.run_flops:.3g}; what is computed again for memory is not counted."
    )


def _checkpoint(plan: Plan) -> str:
    found = plan.checkpoint
    line = (
        f"A checkpoint takes up to {human_bytes(found.bytes)} on disk, and "
        f"{human_bytes(found.host_bytes)} of a node's memory while it is written"
    )
    if found.inter_node_bytes:
        line += (
            f"; it sends up to {human_bytes(found.inter_node_bytes)} from a node, to sum "
            f"unfinished windows{' and errors of rounding' if _rounds(plan) else ''}"
        )
    if found.files == 1:
        return f"{line}."
    return (
        f"{line}. The largest of its {found.files:,} files has {found.skew:.2f} times the mean; to "
        f"go on from it the ranks read {found.reread:.2f} times its bytes."
    )


def _rounds(plan: Plan) -> bool:
    return any(e.wire in INTEGER_BITS for e in plan.stages[0].config.levels.spectrum)


def _sharding(plan: Plan) -> str:
    node, spread = plan.sharding[Sharding.node], plan.sharding[Sharding.all]

    def said(found: Sharded) -> str:
        return (
            f"{human_bytes(found.optimizer_bytes)} a GPU and "
            f"{human_bytes(found.mean_bytes_per_step)} a step from a node"
        )

    def way(of: Sharding) -> str:
        return "this run's" if plan.shards == of else f"parallel.shard_optimizer={of.value}"

    line = (
        f"Optimizer state over the GPUs of a node: {said(node)}; over those of all nodes "
        f"({way(Sharding.all)}): {said(spread)}"
    )
    if plan.whole is None:
        return f"{line}."
    whole = plan.sharding[Sharding.matrices]
    return (
        f"{line}; with each matrix on one node ({way(Sharding.matrices)}): the same, and "
        f"{human_bytes(whole.mean_bytes_per_step)} a step."
    )


def _whole(whole: WholePlan) -> str:
    rules = ", ".join(sorted({level.rule for level in whole.levels}))
    count = sum(level.matrices for level in whole.levels)
    inside = sum(level.parameters for level in whole.levels)
    line = f"Whole matrices ({rules}): {count:,}, {human_count(inside)} parameters in them"
    if whole.owners > 1:
        line += (
            f", those of a pipeline rank dealt over {whole.owners} ranks. To join them a rank "
            f"sends {human_bytes(whole.in_node_bytes_per_step)} a step in its node, at most "
            f"{human_bytes(whole.in_node_peak_bytes)}"
        )
    if whole.inter_node_bytes_per_step:
        line += (
            f", and a node {human_bytes(whole.inter_node_bytes_per_step)} to others, counted above"
        )
    line += (
        f". Newton-Schulz takes {whole.newton_schulz_flops_per_step:.3g} FLOPs a step, "
        f"{whole.to_model_flops:.1%} of the model's"
    )
    mean, most = whole.newton_schulz_seconds_per_step, whole.newton_schulz_peak_seconds
    if mean is None or most is None:
        return f"{line}."
    return (
        f"{line}; a rank computes or waits for it {human_seconds(mean)} a step, at most "
        f"{human_seconds(most)}."
    )


def _stages(plan: Plan, crosses: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("from\nstep", justify="right", no_wrap=True)
    columns = ["\nsteps", "sequences\na step", "tokens a\nsequence", "tokens\na step", "\ntokens"]
    columns += ["GiB\na GPU", "\ncomputes"] + ["\nwaits"] * crosses
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for own in plan.stages:
        stage, known = own.stage, own.computes is not None
        cells = [
            f"{stage.first_step + 1:,}",
            f"{stage.steps:,}",
            f"{stage.global_batch:,}",
            f"{stage.sequence_length:,}",
            human_count(stage.tokens_per_step),
            human_count(stage.tokens),
            f"{own.memory.largest.total / GIB:.3g}",
            "-" if own.computes is None else human_seconds(own.computes),
        ]
        if crosses:
            cells.append(human_seconds(own.waits) if known else "-")
        table.add_row(*cells)
    return table


def _explain_stages(plan: Plan) -> str:
    fullest = plan.fullest.stage
    line = (
        f"What follows is of the stage that begins with step {fullest.first_step + 1:,}, in which "
        f"a GPU needs most memory; the levels send as much in a step of every other"
    )
    if plan.run_seconds is None:
        return f"{line}."
    return f"{line}. All steps take {human_seconds(plan.run_seconds)}."


def _levels(plan: Plan, crosses: bool) -> Table:
    # narrow enough for a terminal of 80 columns
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("\nlevel", no_wrap=True)
    columns = ["\nparameters", "period,\nsteps", "\nupdates"]
    if crosses:
        columns += ["bytes,\nmean", "peak\naligned", "peak\nstaggered", "link\ntime"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    seconds = plan.cluster.link_seconds
    for i, level in enumerate(plan.levels):
        period = said_periods(own.period for own in level.run_periods)
        cells = [human_count(level.parameters), period, f"{level.updates:,}"]
        if crosses:
            mean = float(plan.aligned.mean_per_level[i])
            cells += [
                human_bytes(mean),
                human_bytes(plan.aligned.peak_per_level[i]),
                human_bytes(plan.staggered.peak_per_level[i]),
                human_seconds(seconds(mean)),
            ]
        table.add_row(level.name, *cells)
    if crosses:
        table.add_section()
        total = [plan.aligned.mean, plan.aligned.peak, plan.staggered.peak]
        table.add_row(
            "all levels",
            human_count(plan.parameters), "", "",
            *map(human_bytes, total),
            human_seconds(seconds(plan.aligned.mean)),
            style="bold",
        )  # fmt: skip
        table.add_row(
            "plain",
            human_count(plan.parameters), "1", f"{plan.steps:,}",
            *[human_bytes(plan.plain)] * 3,
            human_seconds(seconds(plan.plain)),
        )  # fmt: skip
    return table


def _parts(plan: Plan) -> str:
    of = [f"{level.name} has {', '.join(level.parts)}" for level in plan.levels]
    return f"Parts of the model: {'; '.join(of)}."


def _outer(level: LevelPlan) -> str:
    every = f"every {level.outer_every} updates" if level.outer_every != 1 else "after each update"
    line = f"Level {level.name!r} makes an outer step {every}"
    if not level.local:
        return f"{line}."
    return f"{line}; it is local: what its updates have made crosses then, and no gradient does."


def _summarise(plan: Plan, console: Console) -> None:
    assert plan.fewer is not None
    console.print(
        f"Bytes are gradients leaving a node in a step; plain is plain data parallel. Levels send "
        f"{plan.fewer:.2f} times fewer; their largest step is "
        f"{plan.aligned.peak / plan.plain:.2f} of plain when aligned, "
        f"{plan.staggered.peak / plan.plain:.2f} when staggered."
    )
    if any(level.periods for level in plan.levels):
        console.print(
            f"Periods change, and means are those of the run: in {plan.steps:,} steps a node sends "
            f"{human_bytes(plan.aligned.mean * plan.steps)}."
        )
    if not plan.defers:
        console.print("levels.reduction=every-step: this run sends what plain data parallel sends.")
    else:
        chosen = "staggered" if plan.staggers else "aligned"
        peak = (plan.staggered if plan.staggers else plan.aligned).peak
        console.print(
            f"This run is {chosen}: at most {human_seconds(plan.cluster.link_seconds(peak))} of "
            f"link time in a step. The last step, which applies unfinished windows, is not counted."
        )


def _exposure(plan: Plan, exposure: Exposure) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("link time of a step", no_wrap=True)
    for name in ("hidden", "exposed"):
        table.add_column(name, justify="right", no_wrap=True)
    run, plain = exposure.run, exposure.plain
    for level, *seconds in zip(plan.levels, run.hidden, run.exposed, strict=True):
        table.add_row(level.name, *map(human_seconds, seconds))
    table.add_section()
    for name, time, style in (("all levels", run, "bold"), ("plain", plain, None)):
        table.add_row(name, *map(human_seconds, (sum(time.hidden), sum(time.exposed))), style=style)
    return table


def _explain_exposure(plan: Plan, exposure: Exposure, console: Console) -> None:
    source = "as given"
    if exposure.utilisation is not None:
        source = f"at {exposure.utilisation:.0%} of {plan.cluster.gpu_tflops:g} TFLOP/s a GPU"
    over = "the steps" if any(level.periods for level in plan.levels) else "a cycle"
    console.print(
        f"A step computes for {human_seconds(exposure.step_seconds)}, {source}; reductions between "
        f"nodes can hide in the backward pass of its last micro batch, "
        f"{human_seconds(exposure.backward_seconds)}. Means of {over}"
        + (", of the rank that ends last at each step." if plan.pipeline.ranks > 1 else ".")
    )


def _memory(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    rank = plan.memory.largest
    table.add_column("memory", no_wrap=True)
    for name in (*rank.terms, "total", "of"):
        table.add_column(name, justify="right", no_wrap=True)
    sizes = [_in_gib(size, rank) for size in (*rank.terms.values(), rank.total)]
    table.add_row("GiB", *sizes, f"{plan.memory.gpu_gib:g}")
    return table


def _host(host: HostPlan) -> str:
    names = ", ".join(level.name for level in host.levels)
    what = f"state of {names}" if names else "buffers before drives"
    return (
        f"In host memory: {what}, {host.gpu_bytes / GIB:.3g} GiB of a GPU, "
        f"{host.node_bytes / GIB:.3g} GiB of a node; it frees {host.freed_bytes / GIB:.3g} GiB of "
        f"the GPU, of which the ring takes {host.ring_bytes / GIB:.3g}. A GPU streams "
        f"{human_bytes(host.streamed_bytes_per_step)} a step in and out, at most "
        f"{human_bytes(host.streamed_peak_bytes)}, and waits "
        f"{human_seconds(host.waited_seconds_per_step)} for it, at most "
        f"{human_seconds(host.waited_peak_seconds)}."
    )


def _nvme(nvme: NvmePlan, cluster: Cluster, step_seconds: float | None) -> str:
    share = "" if nvme.endurance is None else f", {nvme.endurance:.1%} of what they last for"
    line = (
        f"On drives: state of {', '.join(nvme.levels)}, {nvme.gpu_bytes / GIB:.3g} GiB of a GPU, "
        f"{nvme.node_bytes / GIB:.3g} GiB of a node, to which the run writes "
        f"{human_bytes(nvme.written_bytes)}{share}. At {cluster.nvme_gbyte:g} GB/s of a node "
        f"reading takes {human_seconds(nvme.stream_seconds_per_step)} a step, at most "
        f"{human_seconds(nvme.stream_peak_seconds)}; "
    )
    if nvme.waited_peak_seconds:
        third = human_seconds(nvme.waited_peak_seconds)
        line += f"more than two groups are due at one step, which waits {third} for them; "
    enough = human_seconds(nvme.hidden_from_seconds)
    if step_seconds is None:
        return f"{line}it is read ahead where a step takes {enough} or more."
    hides = "hides" if step_seconds >= nvme.hidden_from_seconds else "does not hide"
    took = human_seconds(step_seconds)
    return f"{line}a step takes {took}, which {hides} it ({enough} would)."


def _explain_memory(plan: Plan, console: Console) -> None:
    memory = plan.memory
    which = "a GPU"
    if len(memory.ranks) > 1:
        which = f"a GPU of pipeline rank {memory.fullest}, the fullest"
    console.print(
        f"Of {which}. {USABLE:.0%} of the memory, {memory.usable_gib:.3g} GiB, counts as usable; "
        f"the rest is for NCCL, fragmentation and what is not counted."
    )
    rank = memory.largest
    more = rank.instead - rank.activations
    console.print(
        f"When activations are gone, an update takes {_in_gib(rank.update, rank)} GiB in passing, "
        f"a validation {_in_gib(rank.validation, rank)}, a comparison of the replicas "
        f"{_in_gib(rank.comparison, rank)}"
        + (f"; {_in_gib(more, rank)} more than activations, in the total." if more > 0 else ".")
    )


def _in_gib(size: float, rank: RankMemory) -> str:
    return f"{size / GIB:.{2 if rank.total >= GIB else 4}f}"


def _explain_pipeline(plan: Plan, console: Console) -> None:
    pipeline = plan.pipeline
    stages = pipeline.ranks * pipeline.virtual_stages
    console.print(
        f"Pipeline of {pipeline.ranks} ranks, {stages} stages, {pipeline.micro_batches} micro "
        f"batches a step: a rank waits {pipeline.bubble:.1%} of a step; the costliest stage costs "
        f"{pipeline.imbalance:.2f} times the mean."
    )


def human_seconds(seconds: float) -> str:
    """``0.0123`` as ``12.3 ms``; three significant digits."""
    for limit, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= limit:
            return f"{seconds / limit:.3g} {unit}"
    return f"{seconds * 1e6:.2g} us"
