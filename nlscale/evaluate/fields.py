"""What `nlscale eval --json` writes, field by field; see `nlscale.telemetry.fields`.

A page of the reference is made of these tables, and tests hold results to them, both ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nlscale.telemetry.fields import Field

_ANSWER = {
    "run": Field("text", "", "the folder of the model, as it was named"),
    "step": Field("integer", "steps", "of its checkpoint"),
    "mixer": Field("text", "", "of the model"),
}

FAILED: Mapping[str, Field] = {
    "run": _ANSWER["run"],
    "error": Field("text", "", "cause and fix"),
}
"""Of a model that could not be asked, where several were."""

_FIGURES = Field(
    "object",
    "",
    "what wandb gets, without intervals",
    fields={"FIGURE": Field("number", "its own", "a figure of those above, by a name for it")},
)

_INTERVAL = "low and high end of the 95% interval"
_ONE_CONTEXT = "there is one context"

_RATIO = {
    "value": Field("number", "", "the figure"),
    "interval": Field("list of numbers", "", _INTERVAL, null=_ONE_CONTEXT),
    "samples": Field("integer", "contexts", "of which a target counts"),
}

_RANGE = {
    "from": Field("integer", "tokens", "positions of the range are above it"),
    "to": Field("integer", "tokens", "and at most this"),
    "contexts": Field("integer", "contexts", "that reach so far, and of which a target counts"),
    "targets": Field("integer", "tokens", "that count"),
    "loss": Field(
        "object", "nats a token", "mean over the targets", null="none counts", fields=_RATIO
    ),
    "perplexity": Field("object", "", "e to the loss", null="none counts", fields=_RATIO),
    "bits_per_byte": Field(
        "object",
        "bits",
        "loss for each byte of the text that the targets stand for",
        null="they stand for no text",
        fields=_RATIO,
    ),
}

_LEARNS = {
    "level": Field("text", "", "its name"),
    "chunk": Field("integer", "tokens", "between two changes"),
    "objective": Field("text", "", "`ntp`"),
    "learning_rate": Field("number", "", "of a change"),
    "clip": Field("number", "", "the largest norm of a gradient", null="any"),
    "pull": Field("number", "", "toward the trained weights"),
    "reset": Field("text", "", "`sequence`, or `never`"),
    "blocks": Field("integer", "blocks", "the last ones, which learn"),
}

_LOSS = {
    "text": Field("text", "", "what was read"),
    "tokens": Field("integer", "tokens", "that it has"),
    "contexts": Field(
        "object",
        "",
        "how many contexts were read",
        fields={"LENGTH": Field("integer", "contexts", "of that many tokens")},
    ),
    "trained_length": Field(
        "integer", "tokens", "`data.sequence_length` of the training, of its stages the longest"
    ),
    "document_mask": Field(
        "true or false",
        "",
        "`data.document_mask` of the training: whether no document saw those before it, as it does "
        "here",
    ),
    "context": Field(
        "list of objects",
        "",
        "the levels that learned from what was read; none: the weights stayed as they were",
        fields=_LEARNS,
    ),
    "positions": Field(
        "list of objects", "", "the ranges of `--lengths`, which the table shows", fields=_RANGE
    ),
    "all": Field("object", "", "all positions together", fields=_RANGE),
    "curve": Field(
        "list of objects",
        "",
        "what the figure draws: the same targets in ranges half an octave wide, from one that ends "
        "at 16 tokens; the ends of `positions` are among theirs",
        fields=_RANGE,
    ),
    "figures": _FIGURES,
}

_SHARE = {
    "right": Field("number", "", "of them, how many are right"),
    "of": Field("integer", "", "how many there are"),
    "worth": Field(
        "number",
        "",
        "how many independent ones they say as much as, by which the interval goes: those of one "
        "example go right together",
        null="as many as there are",
    ),
    "share": Field("number", "share", "right ones of all"),
    "interval": Field("list of numbers", "share", f"{_INTERVAL}, Wilson's"),
}

_INSTRUMENT = {
    "task": Field("text", "", "as `--source` builds it"),
    "about": Field("text", "", "what it asks"),
    "chance": Field("number", "share", "of the targets that a guess has right"),
    "lengths": Field(
        "list of objects",
        "",
        "one for each of `--lengths`",
        fields={
            "factor": Field("integer", "", "how many times as long as in training"),
            "task": Field("text", "", "the longer task, as `--source` builds it"),
            "length": Field("integer", "tokens", "of an example"),
            "targets": Field("object", "", "targets that count", fields=_SHARE),
            "examples": Field("object", "", "examples without a mistake", fields=_SHARE),
        },
    ),
    "figures": _FIGURES,
}

_SYMBOLS = {"symbols": Field("true or false", "", "true: a task of symbols was asked")}

_NEEDLE = {
    "symbols": Field("true or false", "", "false: needles in text were asked"),
    "form": Field("text", "", "`ruler` or `short`: the words around a question"),
    "haystack": Field("text", "", "the file or folder of it; `noise`: sentences repeated"),
    "samples": Field("integer", "samples", "of each kind and length"),
    "trained_length": Field(
        "integer", "tokens", "`data.sequence_length` of the training, of its stages the longest"
    ),
    "trained_on": Field("text", "", "the task of needles in training", null="it was another text"),
    "kinds": Field("list of texts", "", "that were asked"),
    "lengths": Field("list of integers", "tokens", "of prompt and answer"),
    "cells": Field(
        "list of objects",
        "",
        "one for each kind and length",
        fields={
            "kind": Field("text", "", "of needle"),
            "length": Field("integer", "tokens", "of prompt and answer"),
            "score": Field(
                "object",
                "",
                "samples; one of which some values are found counts as that part of one",
                fields=_SHARE,
            ),
            "depths": Field(
                "list of objects",
                "",
                "one for each range of depth in which a value was hidden",
                fields={
                    "from": Field("number", "share", "of the haystack that is before the range"),
                    "to": Field("number", "share", "of the haystack at its end"),
                    **_SHARE,
                    "of": replace(_SHARE["of"], meaning="values that were hidden there"),
                },
            ),
        },
    ),
    "figures": _FIGURES,
}

_HARNESS = {
    "harness": Field("text", "", "version of lm-evaluation-harness"),
    "limit": Field("integer", "documents", "`--limit`", null="all were asked"),
    "max_length": Field("integer", "tokens", "`--max-length`", null="nothing was cut"),
    "tasks": Field(
        "list of objects",
        "",
        "the tasks, and after them the groups that have figures of their own",
        fields={
            "task": Field("text", "", "its name"),
            "version": Field("number or text", "", "that the harness gives it"),
            "fewshot": Field("integer", "examples", "before each question", null="of a group"),
            "documents": Field("integer", "documents", "that were asked"),
            "of": Field("integer", "documents", "that the task has"),
            "figures": Field(
                "list of objects",
                "",
                "its metrics",
                fields={
                    "metric": Field("text", "", "its name in the harness"),
                    "filter": Field("text", "", "that answers went through; `none`"),
                    "value": Field("number", "its own", "the harness's own"),
                    "stderr": Field(
                        "number",
                        "its own",
                        "standard error over the documents",
                        null="there is one document, or the harness gives a group none",
                    ),
                    "interval": Field(
                        "list of numbers", "its own", _INTERVAL, null="there is no `stderr`"
                    ),
                },
            ),
        },
    ),
    "figures": _FIGURES,
}

ANSWERS: Mapping[str, Mapping[str, Field]] = {
    name: {**_ANSWER, **result}
    for name, result in {
        "loss": _LOSS,
        "needle": _NEEDLE,
        "needle of symbols": {**_SYMBOLS, **_INSTRUMENT},
        "recall, automata, mad, babi": _INSTRUMENT,
        "harness": _HARNESS,
    }.items()
}
"""Of a model, by the evaluations that it was asked."""
