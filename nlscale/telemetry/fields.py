"""What the files of a run hold, field by field: metrics.jsonl, summary.json and attempts.jsonl.

The pages of the reference are made of these tables, and tests hold the files of real runs against
them, in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Field:
    """A field of a record, as JSON has it."""

    type: str
    """`integer`, `number`, `text`, `number or text`, `true or false`, `object`, or `list of`
    objects, texts, numbers or integers."""
    unit: str
    """Of its value; empty where it has none."""
    meaning: str
    """A sentence without its stop."""
    null: str = ""
    """Where its value is null, empty: never. A number that is not finite is null besides."""
    only: str = ""
    """Where there is such a field, empty: in every record."""
    fields: Mapping[str, Field] = field(default_factory=dict)
    """Of the object, or of each entry of the list. A name in capitals stands for names that the run
    or the configuration gives."""


_NOT_FINITE = Field(
    "list of texts",
    "",
    "dotted names of the fields whose value was infinite or no number, and was written as null",
    only="some field is not finite",
)

_PARTS = (
    "windows of the level have parts to compare, a period above 1 or more than one node, and do "
    "not cross as integers"
)

_LEVEL = {
    "period": Field(
        "integer", "steps", "of windows of the level that begin with this step, until it updates"
    ),
    "updates": Field("integer", "", "made so far, by that of its sync groups that made most"),
    "reductions": Field("integer", "", "across nodes so far, of the same; the same on one node"),
    "updated": Field("true or false", "", "whether one of its sync groups updated at this step"),
    "window_fill": Field(
        "number", "share of the period", "what its fullest window holds after this step, 0 to 1"
    ),
    "learning_rate": Field(
        "number",
        "",
        "at the update of this step; of a level that holds a copy, how far that went",
        null="no sync group of it updated",
    ),
    "grad_norm": Field(
        "number",
        "nats a token",
        "norm of the mean gradient of the windows that were applied, before clipping",
        null="no sync group of it updated, or it holds a copy",
    ),
    "update_ratio": Field(
        "number",
        "",
        "norm of the update over the norm of the weights that it changed",
        null="no sync group of it updated, it holds a copy, or this was not measured: at period 1 "
        "every tenth is",
    ),
    "gradient_noise_scale": Field(
        "number",
        "tokens",
        "the batch at which the noise of its gradient is as large as the gradient: "
        "`gradient_noise` over `gradient_signal`",
        null="no window has closed that shows it, or `gradient_signal` is not above 0",
        only=_PARTS,
    ),
    "gradient_noise": Field(
        "number",
        "nats^2 a token",
        "trace of the covariance of its gradient over tokens, a moving average of about 50 updates",
        null="no window has closed that shows it",
        only=_PARTS,
    ),
    "gradient_signal": Field(
        "number",
        "nats^2 a token^2",
        "square of the norm of its mean gradient without that noise, an average likewise; it may "
        "be below 0",
        null="no window has closed that shows it",
        only=_PARTS,
    ),
}

_WAITS = {
    "data": Field("number", "s", "while the next batch was read"),
    "link": Field(
        "number",
        "s",
        "for reductions across nodes that the backward pass did not hide; ranks of other nodes "
        "that came later are in it",
    ),
    "host": Field(
        "number",
        "s",
        "while the host did anything else between two steps, but for validations and checkpoints",
    ),
}

_MEMORY = Field(
    "integer",
    "bytes",
    "most that the first rank has held since this start, on its GPU; where it computes on a CPU, "
    "of all its memory",
)

_NONE_COUNTS = "none of them counts as a target"
_NO_TEXT = "the tokens that count stand for no text, or there are none"

_VALIDATED = {
    "loss": Field("number", "nats a token", "on its held-out sequences", null=_NONE_COUNTS),
    "bits_per_byte": Field("number", "bits", "the same, for each byte of text", null=_NO_TEXT),
}

_MIXED = "the data are a mixture"
_OF_SOURCES = Field(
    "object",
    "",
    "the sources of a mixture by name",
    only=_MIXED,
    fields={"SOURCE": Field("object", "", "one source", fields=_VALIDATED)},
)

_OF_END = {
    "sequence_length": Field("integer", "tokens", "with which the run ends"),
    "loss": Field("number", "nats a token", "mean over the targets that count", null=_NONE_COUNTS),
    "bits_per_byte": Field("number", "bits", "the same, for each byte of text", null=_NO_TEXT),
    "sources": _OF_SOURCES,
}
_TWO_LENGTHS = "`data.stages` give the end of the run another sequence length than its beginning"

_NO_PEAK = "on a CPU, in fp32, and on GPUs whose peak is not known"

_RANKS = {
    "fastest": Field("number", "s", "that the fastest rank computes"),
    "median": Field("number", "s", "that the median rank computes, the lower of two"),
    "slowest": Field("number", "s", "that the slowest rank computes"),
    "slowest_rank": Field("integer", "", "which that is"),
    "slowest_host": Field("text", "", "the host it runs on"),
}

_SOURCE = {
    "loss": Field(
        "number",
        "nats a token",
        "mean over the targets of this source in the global batch that count",
        null="none of them is in the step",
    ),
    "tokens": Field("integer", "tokens", "of it, read so far, those of dropped steps among them"),
    "epochs": Field("number", "", "times that its training tokens were read so far"),
}

METRICS: Mapping[str, Mapping[str, Field]] = {
    "train": {
        "kind": Field("text", "", "`train`"),
        "step": Field("integer", "steps", "taken so far, this one included"),
        "time": Field("number", "Unix s", "when the step was over"),
        "tokens": Field("integer", "tokens", "of all steps so far, without those dropped"),
        "counted_tokens": Field(
            "integer",
            "tokens",
            "among them that counted as targets: all, where the data have no masks",
        ),
        "loss": Field(
            "number",
            "nats a token",
            "mean over the targets of the global batch that count, before the update",
            null="none of the step counts: it is taken, and adds nothing to any window",
        ),
        "tokens_per_second": Field("number", "tokens/s", "of this step, over all ranks"),
        "step_seconds": Field("number", "s", "from reading the batch to the end of the update"),
        "mfu": Field(
            "number",
            "share",
            "model FLOPs utilisation: the model FLOPs of the step a second over what all GPUs can "
            "do at most in bf16",
            null=_NO_PEAK,
        ),
        "peak_memory_bytes": _MEMORY,
        "waits": Field(
            "object",
            "",
            "of the step and the first rank, seconds in which its device had nothing to do",
            fields=_WAITS,
        ),
        "checkpoint_seconds": Field(
            "number", "s", "that training waited for a checkpoint since the step before"
        ),
        "dropped_steps": Field("integer", "steps", "dropped so far"),
        "dropped_because": Field(
            "text",
            "",
            "why the step was dropped: `loss not finite`, `gradient not finite`, or `spike` with "
            "the loss and the limit that it was above",
            null="it was not dropped",
        ),
        "bytes_sent": Field(
            "number",
            "bytes",
            "of gradients between nodes so far, a node, the mean over nodes; counted as `nlscale "
            "plan` counts them, not measured",
        ),
        "bytes_saved": Field(
            "number", "bytes", "the same that were not sent, because levels were not due"
        ),
        "levels": Field(
            "object",
            "",
            "the levels by name, fastest first",
            fields={"LEVEL": Field("object", "", "one level", fields=_LEVEL)},
        ),
        "sources": Field(
            "object",
            "",
            "the sources of a mixture by name",
            only=_MIXED,
            fields={"SOURCE": Field("object", "", "one source", fields=_SOURCE)},
        ),
        "ranks": Field(
            "object",
            "",
            "seconds that a rank computes of a step before it waits for others, the median of the "
            "steps since the last comparison, over the ranks",
            only="`parallel.straggler_check_every` divides the step, on more than one rank",
            fields=_RANKS,
        ),
        "not_finite": _NOT_FINITE,
    },
    "validation": {
        "kind": Field("text", "", "`validation`"),
        "step": Field("integer", "steps", "taken so far"),
        "time": Field("number", "Unix s", "when it was over"),
        "seconds": Field("number", "s", "that it took"),
        "tokens": Field("integer", "tokens", "trained on so far"),
        "loss": Field(
            "number",
            "nats a token",
            "mean over the targets of the held-out sequences that count; of a mixture, the mean of "
            "its sources' by the shares of their weights",
            null=_NONE_COUNTS,
        ),
        "bits_per_byte": Field(
            "number",
            "bits",
            "the same, for each byte of the text that these stand for",
            null=_NO_TEXT,
        ),
        "sources": _OF_SOURCES,
        "of_end": Field(
            "object",
            "",
            "the same at the sequence length with which the run ends",
            only=_TWO_LENGTHS,
            fields=_OF_END,
        ),
        "not_finite": _NOT_FINITE,
    },
    "evaluation": {
        "name": Field(
            "text", "", "which of those that `evaluate` names, or the hook that records it"
        ),
        "kind": Field("text", "", "`evaluation`"),
        "step": Field("integer", "steps", "taken so far"),
        "time": Field("number", "Unix s", "when it was over"),
        "seconds": Field("number", "s", "that it took"),
        "tokens": Field("integer", "tokens", "trained on so far"),
        "FIGURE": Field(
            "number",
            "its own",
            "what the evaluation found, by its own names: `positions` FROM-TO/loss, in nats a "
            "token, for ranges of positions; `task` accuracy and chance, shares; `loss` those of "
            "a validation; of a mixture SOURCE/FIGURE, for each source",
            null="no target counts, or `not_finite` names it",
        ),
        "not_finite": _NOT_FINITE,
    },
}
"""Fields of the records of metrics.jsonl, by their kind."""

_GOODPUT = {
    "wall_seconds": Field("number", "s", "from the first start to the end"),
    "training": Field("number", "share", "steps that the run consists of: the goodput"),
    "dropped": Field("number", "share", "steps that were dropped"),
    "validation": Field("number", "share", "validations and evaluations"),
    "checkpoints": Field("number", "share", "waiting for checkpoints"),
    "startup": Field("number", "share", "from each start until it trains"),
    "down": Field("number", "share", "between two starts"),
    "redone": Field("number", "share", "what was lost with a start and done again"),
    "other": Field("number", "share", "the rest"),
}

PERIODS = {
    "period_steps": Field(
        "integer", "steps", "between two updates of a parameter; where it changes, at most"
    ),
    "periods": Field(
        "list of objects",
        "",
        "the periods in the run, one where it does not change",
        fields={
            "from_step": Field("integer", "steps", "the first of the windows that have it"),
            "period_steps": Field("integer", "steps", "between two updates"),
        },
    ),
}
"""Of a level, as `nlscale.levels.spectrum.periods_to_plain` says them in a plan and a summary."""

SUMMARY: Mapping[str, Field] = {
    "initial_loss": Field("number", "nats a token", "of the first step whose loss was finite"),
    "final_train_loss": Field(
        "number",
        "nats a token",
        "mean over the last steps that were not dropped, a twentieth of the run's steps",
    ),
    "final_val_loss": Field("number", "nats a token", "of the last validation", null=_NONE_COUNTS),
    "val_bits_per_byte": Field("number", "bits", "the same, for each byte of text", null=_NO_TEXT),
    "val_of_end": Field(
        "object",
        "",
        "`of_end` of the last validation",
        only=_TWO_LENGTHS,
        fields=_OF_END,
    ),
    "unigram_bits_per_byte": Field(
        "number",
        "bits",
        "what the frequencies of the training tokens reach on the same text",
        null=_NO_TEXT,
    ),
    "steps": Field("integer", "steps", "of the run"),
    "dropped_steps": Field("integer", "steps", "that entered no update"),
    "tokens": Field("integer", "tokens", "trained on"),
    "tokens_per_second": Field(
        "number",
        "tokens/s",
        "median over the steps of the last start",
        null="it took no step",
    ),
    "mfu": Field("number", "share", "the same of the steps' `mfu`", null=_NO_PEAK),
    "peak_memory_bytes": _MEMORY,
    "waits": Field(
        "object",
        "",
        "the same of a step, the mean over those of the last start",
        fields={kind: replace(wait, null="it took no step") for kind, wait in _WAITS.items()},
    ),
    "parameters": Field("integer", "", "of the model"),
    "parameters_non_embedding": Field("integer", "", "the same without the embedding"),
    "flops": Field(
        "number",
        "FLOPs",
        "model FLOPs of the run, forward and backward; of sequences of several lengths those of a "
        "token are the mean over the run",
    ),
    "levels": Field(
        "list of objects",
        "",
        "the levels, fastest first",
        fields={
            "name": Field("text", "", "of the level"),
            "parts": Field(
                "list of texts", "", "of the model that belong to it, see `levels.spectrum.N.parts`"
            ),
            **PERIODS,
            "parameters": Field("integer", "", "of the level"),
            "updates": Field("integer", "", "made, by that of its sync groups that made most"),
            "reductions": Field("integer", "", "across nodes, of the same"),
            "wire": Field("text", "", "how its gradients crossed; only `fp32` is exact"),
            "outer_steps": Field("integer", "", "made, by that of its sync groups that made most"),
            "local": Field(
                "true or false", "", "whether each node updated it by its own gradients"
            ),
            "copy_rate": Field(
                "number", "", "how far its copy went at an update", null="it holds no copy"
            ),
            "approximate": Field(
                "true or false",
                "",
                "whether its updates depended on the number of nodes: it is local, or another "
                "level is, or its gradients crossed rounded",
            ),
        },
    ),
    "goodput": Field(
        "object",
        "",
        "what became of the time since the first start; the shares sum to 1",
        fields=_GOODPUT,
    ),
    "not_finite": _NOT_FINITE,
}
"""Fields of summary.json."""

ATTEMPTS: Mapping[str, Mapping[str, Field]] = {
    "begin": {
        "event": Field("text", "", "`begin`: an attempt begins to train"),
        "time": Field("number", "Unix s", "when its process began"),
        "trains": Field("number", "Unix s", "when it had started up"),
        "step": Field("integer", "steps", "from which it goes on"),
        "redone": Field("number", "s", "of work after that step, lost and done again"),
        "down": Field("number", "s", "since the last record of the attempt before"),
        "job": Field("text", "", "the Slurm job that started it", null="no job did"),
        "host": Field("text", "", "of its first rank"),
    },
    "end": {
        "event": Field("text", "", "`end`: an attempt ends before the run does"),
        "time": Field("number", "Unix s", "when it did"),
        "reason": Field("text", "", "what it ended with, as one line"),
    },
}
"""Fields of the lines of attempts.jsonl, by their event."""
