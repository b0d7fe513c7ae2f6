"""What `nlscale plan --json` prints, field by field; see `nlscale.telemetry.fields`."""

from __future__ import annotations

from collections.abc import Mapping

from nlscale.telemetry.fields import PERIODS, Field

_ONE_NODE = "no gradient crosses the network"
_NOT_LOCAL = "no level is local"

_TRAFFIC = {
    "mean_bytes_per_step": Field("number", "bytes", "that a node sends a step, deferred"),
    "run_bytes": Field(
        "number", "bytes", "the same in all of the run, with the crossings that its end adds"
    ),
    "peak_bytes_aligned": Field(
        "number", "bytes", "the same at the largest step, where all blocks update at the same step"
    ),
    "peak_bytes_staggered": Field(
        "number", "bytes", "the same at the largest step, with phases by depth"
    ),
    "link_seconds_per_step": Field("number", "s", "the mean at the full rate of a node's links"),
}

_EXPOSED = {
    "hidden_link_seconds": Field(
        "number", "s", "of the link's time a step, that passes while the last backward pass goes on"
    ),
    "exposed_link_seconds": Field("number", "s", "of it that a step waits for when that is over"),
}

_RANK = {
    "weights": Field("number", "bytes", "in the dtype of training"),
    "gradients": Field("number", "bytes", "megatron-core's buffer, in fp32"),
    "windows": Field(
        "number",
        "bytes",
        "sums of the levels of a period above 1, in fp32; errors of rounding of levels that cross "
        "as integers; and what crossing rounded takes in passing",
    ),
    "optimizer": Field(
        "number",
        "bytes",
        "what the rule keeps, fp32 weights beside bf16 ones, and what outer steps keep; not what "
        "lies in host memory, but the ring through which that is streamed",
    ),
    "activations": Field("number", "bytes", "of the micro batches in flight"),
    "update": Field("number", "bytes", "that an update takes in passing, in place of activations"),
    "validation": Field(
        "number", "bytes", "of one micro batch without a backward pass, in place of activations"
    ),
    "comparison": Field(
        "number", "bytes", "that a comparison of the replicas takes, in place of activations"
    ),
    "total": Field("number", "bytes", "state, and the largest of what takes the place of others"),
}

_SHARDED = {
    "optimizer_bytes": Field("number", "bytes", "of optimizer state on the fullest GPU"),
    "total_bytes": Field("number", "bytes", "of everything on that GPU"),
    "mean_bytes_per_step": Field("number", "bytes", "that a node sends a step, deferred"),
}

_UNTIMED = "neither the cluster's `gpu_tflops` nor `--step-seconds` is given, or in fp32"

_STAGE = {
    "first_step": Field("integer", "steps", "of the run before the stage begins"),
    "steps": Field("integer", "steps", "of the stage"),
    "global_batch": Field("integer", "sequences", "a step, over all ranks"),
    "sequence_length": Field("integer", "tokens", "a sequence"),
    "tokens_per_step": Field("integer", "tokens", "of a global batch"),
    "tokens": Field("integer", "tokens", "of the stage"),
    "flops_per_token": Field("number", "FLOPs", "of a training token at that length"),
    "memory_bytes": Field("number", "bytes", "of everything on the fullest GPU"),
    "fits": Field("true or false", "", "whether that is within the usable share"),
    "micro_batches": Field("integer", "", "of a step, that a rank passes through the model"),
    "bubble": Field("number", "share of a step", "in which a rank of the pipeline waits"),
    "activation_bytes_per_step": Field(
        "number", "bytes", "that a node sends to other pipeline ranks"
    ),
    "step_seconds": Field(
        "number",
        "s",
        "that a step computes; where `--step-seconds` was given, by FLOPs from that of the fullest",
        null=_UNTIMED,
    ),
    "exposed_link_seconds": Field("number", "s", "that a step waits for the link", null=_UNTIMED),
}

PLAN: Mapping[str, Field] = {
    "cluster": Field(
        "object",
        "",
        "of the cluster file",
        fields={
            "name": Field("text", "", "of the cluster"),
            "nodes": Field("integer", "", "machines"),
            "gpus_per_node": Field("integer", "", "GPUs of a node"),
            "inter_node_gbit": Field("number", "Gbit/s", "what a node can send to the others"),
            "gpu_memory_gib": Field("number", "GiB", "memory of a GPU"),
        },
    ),
    "steps": Field("integer", "steps", "of the run"),
    "tokens": Field("integer", "tokens", "of the run"),
    "stages": Field(
        "list of objects",
        "",
        "the stages of the run; where there are several, what is said besides of a step, a token "
        "or the memory is that of the stage in which a GPU needs most memory",
        fields=_STAGE,
    ),
    "run_seconds": Field(
        "number",
        "s",
        "that all steps compute, and wait for the link and for state in host memory",
        null=_UNTIMED,
    ),
    "tokens_per_step": Field("integer", "tokens", "of a global batch"),
    "flops_per_token": Field(
        "number", "FLOPs", "model FLOPs of a training token, forward and backward"
    ),
    "flops_by_part": Field(
        "object",
        "",
        "the same by part of the model",
        fields={
            "PART": Field(
                "number",
                "FLOPs",
                "the `projections` and what else the mixer has (`convolution` and `memory`, or "
                "`attention`), the MLPs of the `levels`, the `head`",
            )
        },
    ),
    "cycle_steps": Field(
        "integer",
        "steps",
        "after which the traffic repeats; with `levels.period_warmup` those of the run",
    ),
    "staggered": Field("true or false", "", "`levels.stagger`"),
    "reduction": Field("text", "", "`levels.reduction`"),
    "levels": Field(
        "list of objects",
        "",
        "the levels, fastest first",
        fields={
            "name": Field("text", "", "of the level"),
            "parts": Field(
                "list of texts", "", "of the model that belong to it, see `levels.spectrum.N.parts`"
            ),
            "parameters": Field("integer", "", "of the level"),
            **PERIODS,
            "updates": Field("integer", "", "in the run, of that sync group that makes most"),
            "reductions": Field("integer", "", "across nodes in the run, of the same"),
            "outer_every": Field(
                "integer", "updates", "between two outer steps", null="it makes none"
            ),
            "local": Field(
                "true or false", "", "whether each node updates it by its own gradients"
            ),
            "copy_rate": Field(
                "number", "", "how far its copy goes at an update", null="it holds no copy"
            ),
            **_TRAFFIC,
        },
    ),
    "total": Field(
        "object",
        "",
        "all levels together",
        fields={"parameters": Field("integer", "", "of the model"), **_TRAFFIC},
    ),
    "plain": Field(
        "object",
        "",
        "what plain data parallel would send, which reduces every level at every step",
        fields={
            "bytes_per_step": Field("number", "bytes", "that a node sends a step"),
            "link_seconds_per_step": Field("number", "s", "at the full rate of a node's links"),
        },
    ),
    "ratio": Field(
        "object",
        "",
        "the run beside plain data parallel",
        fields={
            "plain_to_mean": Field("number", "times", "fewer bytes on average", null=_ONE_NODE),
            "peak_aligned_to_plain": Field(
                "number", "", "`peak_bytes_aligned` over what plain sends", null=_ONE_NODE
            ),
            "peak_staggered_to_plain": Field(
                "number", "", "`peak_bytes_staggered` over what plain sends", null=_ONE_NODE
            ),
        },
    ),
    "exposure": Field(
        "object",
        "",
        "what of the link's time the last backward pass hides, means of a cycle",
        null=f"{_ONE_NODE}, or neither the cluster's `gpu_tflops` nor `--step-seconds` is given",
        fields={
            "step_seconds": Field("number", "s", "that a step computes"),
            "utilisation": Field(
                "number",
                "share",
                "of the GPUs' peak that this follows from",
                null="`--step-seconds` was given",
            ),
            "backward_seconds": Field("number", "s", "of the last micro batch's backward pass"),
            "levels": Field(
                "list of objects",
                "",
                "the levels as configured, fastest first",
                fields={"name": Field("text", "", "of the level"), **_EXPOSED},
            ),
            "run": Field("object", "", "all levels as configured", fields=_EXPOSED),
            "plain": Field(
                "object",
                "",
                "plain data parallel that overlaps as `parallel.overlap` says",
                fields=_EXPOSED,
            ),
        },
    ),
    "activation_bytes_per_step": Field(
        "number",
        "bytes",
        "of activations and their gradients that a node sends to other pipeline ranks, a step; not "
        "in the traffic above",
    ),
    "checkpoint": Field(
        "object",
        "",
        "one checkpoint, at most",
        fields={
            "bytes": Field("integer", "bytes", "on disk"),
            "inter_node_bytes": Field(
                "number",
                "bytes",
                "that a node sends to sum unfinished windows and rounding errors",
            ),
            "host_bytes": Field(
                "number", "bytes", "of a node's memory, the mean, for the copy that is written from"
            ),
            "largest_file_bytes": Field("number", "bytes", "of the rank that writes most"),
            "files": Field("integer", "", "with tensors, one a rank"),
            "resume_bytes": Field(
                "number", "bytes", "that all ranks read to go on from it, verifying not counted"
            ),
        },
    ),
    "shard_optimizer": Field("text", "", "`parallel.shard_optimizer`: `node`, `all` or `matrices`"),
    "sharding": Field(
        "object",
        "",
        "what each of them comes to",
        fields={
            "node": Field("object", "", "sharded over the ranks of a node", fields=_SHARDED),
            "all": Field(
                "object",
                "",
                "sharded over those of all nodes",
                only=_NOT_LOCAL,
                fields=_SHARDED,
            ),
            "matrices": Field(
                "object",
                "",
                "the same, matrices of rules over whole ones by nodes",
                only=_NOT_LOCAL,
                fields=_SHARDED,
            ),
        },
    ),
    "whole_matrices": Field(
        "object",
        "",
        "what rules over whole matrices take",
        null="no level has such a rule",
        fields={
            "levels": Field(
                "list of objects",
                "",
                "the levels that have one, fastest first",
                fields={
                    "name": Field("text", "", "of the level"),
                    "rule": Field("text", "", "`optimizer.rule`, or the level's own"),
                    "matrices": Field("integer", "", "of the model"),
                    "parameters": Field("integer", "", "in them"),
                },
            ),
            "owners": Field(
                "integer", "", "ranks over which the matrices of a pipeline stage are dealt"
            ),
            "in_node_bytes_per_step": Field(
                "number",
                "bytes",
                "that a rank sends to others of its node, the mean; of the pipeline rank that "
                "sends most",
            ),
            "in_node_peak_bytes": Field("number", "bytes", "the same at the largest step"),
            "inter_node_bytes_per_step": Field(
                "number", "bytes", "that a node sends, the mean; part of those of the levels"
            ),
            "newton_schulz_flops_per_step": Field(
                "number",
                "FLOPs",
                "of all ranks, the mean; counted as often as nodes compute the same",
            ),
            "to_model_flops": Field("number", "", "the same over the model FLOPs of a step"),
            "newton_schulz_seconds_per_step": Field(
                "number",
                "s",
                "that a rank computes it or waits for the busiest owner, the mean, at the "
                "utilisation",
                null="in fp32, or the cluster's `gpu_tflops` is not given",
            ),
            "newton_schulz_peak_seconds": Field(
                "number", "s", "the same at the largest step", null="likewise"
            ),
        },
    ),
    "host": Field(
        "object",
        "",
        "what levels of `memory: host` and nvme take, of the pipeline rank that has most",
        null="there are none",
        fields={
            "levels": Field(
                "list of objects",
                "",
                "those levels",
                fields={
                    "name": Field("text", "", "of the level"),
                    "host_bytes": Field("number", "bytes", "in host memory, of all GPUs"),
                },
            ),
            "gpu_bytes": Field(
                "number", "bytes", "in host memory, of one GPU, buffers before a drive included"
            ),
            "node_bytes": Field("number", "bytes", "the same of a node, the mean"),
            "freed_bytes": Field("number", "bytes", "on a GPU, the ring not counted"),
            "ring_bytes": Field("number", "bytes", "on a GPU, `tiers.ring_mib`"),
            "streamed_bytes_per_step": Field(
                "number", "bytes", "of a GPU, in and out together, the mean"
            ),
            "streamed_peak_bytes": Field("number", "bytes", "the same at the largest step"),
            "waited_seconds_per_step": Field(
                "number", "s", "for what comes in, or for gradients that go out, the mean"
            ),
            "waited_peak_seconds": Field("number", "s", "the same at the largest step"),
        },
    ),
    "nvme": Field(
        "object",
        "",
        "what levels of `memory: nvme` take of drives, of the pipeline rank that has most",
        null="there are none",
        fields={
            "levels": Field("list of texts", "", "names of those levels"),
            "gpu_bytes": Field("number", "bytes", "of the state of one GPU"),
            "node_bytes": Field("number", "bytes", "the same of a node, the mean"),
            "written_bytes": Field(
                "number", "bytes", "by the updates of the run to the drives of a node; as many read"
            ),
            "endurance": Field(
                "number",
                "share",
                "that those are of what may be written to the drives of a node",
                null="the cluster's `nvme_endurance_tb` is not given",
            ),
            "stream_seconds_per_step": Field(
                "number", "s", "that reading takes, and writing beside it, the mean"
            ),
            "stream_peak_seconds": Field("number", "s", "the same of one step, at most"),
            "mean_bytes": Field("number", "bytes", "that a GPU reads a step, and writes as many"),
            "hidden_from_seconds": Field(
                "number", "s", "that a step has to take for what is read ahead to be there"
            ),
            "waited_peak_seconds": Field(
                "number", "s", "that a step waits all the same, for a third group of one step"
            ),
        },
    ),
    "memory": Field(
        "object",
        "",
        "of one GPU at the fullest moment of a step",
        fields={
            "ranks": Field("list of objects", "", "the pipeline ranks in order", fields=_RANK),
            "fullest": Field("integer", "", "the pipeline rank that needs most, from 0"),
            "gpu_bytes": Field("number", "bytes", "that a GPU has"),
            "usable_share": Field("number", "share", "of it that a run may fill by this count"),
        },
    ),
    "fits": Field("true or false", "", "whether GPUs and nodes have the memory"),
    "pipeline": Field(
        "object",
        "",
        "how micro batches pass through the stages",
        fields={
            "ranks": Field("integer", "", "`parallel.pipeline`"),
            "virtual_stages": Field("integer", "", "model stages a rank"),
            "micro_batches": Field("integer", "", "of a step, each passing through all stages"),
            "bubble": Field(
                "number",
                "share of a step",
                "in which a rank waits, were all stages equal and the network for nothing",
            ),
            "imbalance": Field("number", "", "cost of the costliest stage over the mean"),
        },
    ),
    "serial_programs": Field(
        "integer",
        "",
        "of a micro batch, that the memory's passes from chunk to chunk run: sequences by heads of "
        "a rank",
        null="the mixer has no memory, or no kernels for it",
    ),
    "advice": Field("list of texts", "", "what would use the GPUs better"),
    "warnings": Field("list of texts", "", "what to look at, such as levels that hardly update"),
}
"""Fields of a plan."""
