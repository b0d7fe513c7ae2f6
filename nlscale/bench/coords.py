"""`nlscale bench coords`: do activations keep their size as a model grows wider?

A coordinate check (Yang et al. 2022, arXiv 2203.03466, appendix D.1): models that differ only in
width are trained for a few steps on one batch, in the standard parametrisation and by muP
(`nlscale.model.width`), and each kind of activation is measured. Where hyperparameters carry over
from one width to another, neither its root mean square nor that of its change since the start
depends on the width: their slopes, d log / d log width, are 0.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nlscale.bench.tokens import random_tokens
from nlscale.config.parts import parts_of
from nlscale.config.vocabulary import (
    Config,
    Dtype,
    ParallelConfig,
    PeriodWarmupConfig,
    head_dim,
    mixer_label,
)
from nlscale.errors import UserError
from nlscale.levels.spectrum import levels_of
from nlscale.model.cms import CMS
from nlscale.model.decoder import Decoder
from nlscale.model.layers import gather_input
from nlscale.parallel.layout import Layout, process_groups
from nlscale.plan.checks import check_sizes
from nlscale.step.trainer import Trainer

SMALL_MODEL = (
    "data.dir=none",
    "data.sequence_length=16",
    "model.layers=2",
    "model.d_model=64",
    "model.heads=4",
    "model.vocabulary=32",
    "model.memory.chunk=4",
    "levels=[1,4]",
    "optimizer.learning_rate=0.003",
)
"""What is checked where no recipe is given."""

STANDARD, MUP = "standard", "mup"
_NAMES = {STANDARD: "standard parametrisation", MUP: "muP"}
_STEPS_SHOWN = 4

Record = Callable[[str, Tensor], None]
"""Takes the name of a kind of part and what one such part gave."""


def check_coordinates(
    config: Config, widths: list[int], steps: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train each width in both parametrisations, measuring before the first and after each step.

    One sequence of random tokens, the same at every step, at the recipe's peak learning rate, in
    fp32, and every level updates at every step: a slow level would not move in so few. The fewer
    the tokens, the more of an update acts on each of them alike at every width; what does not
    falls as 1/sqrt(width), and lets slopes of narrow models look negative.

    Args:
        config: of the model; its head size is kept, other widths grow with d_model.
        widths: values of model.d_model, at least two.
        steps: training steps, 1 or more.
        say: takes a line on each model that is done.

    Returns:
        What was compared, and for each parametrisation `losses` [step][width] in nats and `parts`:
        for each its `size` (root mean square) and `change` (that of the difference to step 0)
        [step][width], and their slopes over log width [step]; None where a number is not finite
        or nothing has changed yet.

    Raises:
        UserError: widths or sizes that do not fit, or `model.vocabulary` is not set.
    """
    if config.model.vocabulary is None:
        raise UserError("bench coords reads no data: give model.vocabulary=256, for example")
    widths = sorted(set(widths))
    if len(widths) < 2:
        raise UserError(f"--widths {widths[0]}: a slope needs two widths or more")
    tuned = config.model.mup_base_width
    base = widths[0] if tuned is None else tuned
    size = head_dim(config.model)
    for width in widths:
        if width < size or width % size:
            raise UserError(
                f"--widths {width} is not a whole number of heads of {size}, the head size of the "
                f"recipe (model.d_model {config.model.d_model} / model.heads {config.model.heads})"
            )
    runs = {
        kind: [_at_width(config, width, base_width, steps) for width in widths]
        for kind, base_width in ((STANDARD, None), (MUP, base))
    }
    for run in [*runs[STANDARD], *runs[MUP]]:
        check_sizes(run, 1)
    found = {}
    with process_groups(runs[STANDARD][0]) as layout:
        for kind, models in runs.items():
            measured = []
            for run in models:
                measured.append(_train_and_measure(run, layout))
                say(f"{_NAMES[kind]}, width {run.model.d_model}: {steps} steps done")
            found[kind] = _collect(widths, measured)
    return {
        "mixer": mixer_label(config.model),
        "widths": widths,
        "mup_base_width": base,
        "head_size": size,
        "steps": steps,
        "learning_rate": config.optimizer.learning_rate,
        "parametrisations": found,
    }


def _at_width(config: Config, width: int, base: int | None, steps: int) -> Config:
    """The same recipe at another width, for a few steps on one process."""
    made = copy.deepcopy(config)
    model, train, ratio = made.model, made.train, width / config.model.d_model
    model.heads = width // head_dim(config.model)
    model.d_model, model.mup_base_width = width, base
    model.hidden = model.hidden and round(model.hidden * ratio)
    for level in made.levels.spectrum:
        level.hidden = level.hidden and round(level.hidden * ratio)
        level.period = "1 step"
    train.steps, train.dtype = steps, Dtype.fp32
    train.global_batch = train.micro_batch = 1
    made.data.stages, made.levels.period_warmup = [], PeriodWarmupConfig()
    made.optimizer.warmup_steps = made.optimizer.warmup_updates = 0
    made.optimizer.min_learning_rate, train.drop_spikes = 1.0, None
    made.parallel = ParallelConfig()
    return made


Measured = list[tuple[float, dict[str, tuple[float, float]]]]
"""By step, from 0: the loss, and the size and change of each part."""


def _train_and_measure(config: Config, layout: Layout) -> Measured:
    assert config.model.vocabulary is not None
    trainer = Trainer.build(config, layout, levels_of(config), config.model.vocabulary)
    (model,) = trainer.stages
    batches = random_tokens(config, 1, 0, 1, layout.device)
    names = [config.levels.spectrum[level].name for level in parts_of(config).mlps]
    first: dict[str, list[Tensor]] = {}
    measured: Measured = []
    for step in range(config.train.steps + 1):
        if step:
            trainer.take_step(batches)
        loss, seen = _activations(model, names, batches[0].tokens, batches[0].targets)
        first = first or seen
        measured.append(
            (
                loss,
                {
                    part: (
                        _rms(now),
                        _rms([a - b for a, b in zip(now, first[part], strict=True)]),
                    )
                    for part, now in seen.items()
                },
            )
        )
    return measured


def _activations(
    model: Decoder, levels: list[str], tokens: Tensor, targets: Tensor
) -> tuple[float, dict[str, list[Tensor]]]:
    """The mean loss, and what each kind of part gave in each block, in the order of the model."""
    seen: dict[str, list[Tensor]] = {}

    def record(part: str, tensor: Tensor) -> None:
        seen.setdefault(part, []).append(tensor.detach().clone())

    with torch.no_grad(), _recording(model, levels, record):
        loss = model(tokens, targets).mean().item()
    return loss, seen


@contextmanager
def _recording(model: Decoder, levels: list[str], record: Record) -> Iterator[None]:
    """While it lasts, every forward pass of the model is recorded part by part."""
    handles = []

    def after(module: Any, part: str, pick: Callable[[Any], Tensor]) -> None:
        hook = module.register_forward_hook(lambda _, inputs, output: record(part, pick(output)))
        handles.append(hook)

    after(model.embedding, "embedding", lambda output: output)
    after(model.head, "logits", lambda output: output[0])
    for block in model.blocks.values():
        assert isinstance(block.mixer, torch.nn.Module) and isinstance(block.cms, CMS)
        mixer: Any = block.mixer
        handles.append(
            mixer.project.register_forward_hook(
                lambda _, inputs, output, mixer=mixer: _record_projections(mixer, output[0], record)
            )
        )
        handles.append(
            mixer.output.register_forward_pre_hook(lambda _, inputs: record("read", inputs[0]))
        )
        after(mixer, "mixer output", lambda output: output[0])
        handles.append(
            block.cms.register_forward_hook(
                lambda cms, inputs, output: _record_cms(cms, torch.add(*inputs[:2]), levels, record)
            )
        )
        after(block.cms, "residual stream", lambda output: torch.add(*output[:2]))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _record_projections(mixer: Any, projected: Tensor, record: Record) -> None:
    """What a mixer projects its input to, each by itself; they lie side by side."""
    parts = projected.split(list(mixer.project.weight.sections), dim=-1)
    for name, part in zip(mixer.projected(), parts, strict=True):
        record(name, part)


def _record_cms(cms: CMS, x: Tensor, levels: list[str], record: Record) -> None:
    """What each level of a CMS adds to the residual stream, computed once more."""
    weights: list[Tensor | float] = [1.0] * len(levels)
    if cms.mixture is not None:
        weights = list(torch.softmax(cms.mixture, 0))
    norms = list(cms.norms) * (len(levels) if len(cms.norms) == 1 else 1)
    start = x
    for name, mlp, norm, weight in zip(levels, cms.mlps, norms, weights, strict=True):
        added = mlp.partial(weight, gather_input(cms.megatron, norm(x)))  # type: ignore[operator]
        record(f"CMS {name}", added)
        x = start if cms.mixture is not None else x + added


def _rms(tensors: list[Tensor]) -> float:
    squares = sum(t.double().square().sum().item() for t in tensors)
    return math.sqrt(squares / sum(t.numel() for t in tensors))


def _collect(widths: list[int], measured: list[Measured]) -> dict[str, Any]:
    """What was measured at each width, by part."""
    by_step = list(zip(*measured, strict=True))
    parts: dict[str, Any] = {}
    for part in measured[0][0][1]:
        size, change = (
            [[seen[part][which] for _, seen in at_step] for at_step in by_step] for which in (0, 1)
        )
        parts[part] = {
            "size": _finite(size),
            "change": _finite(change),
            "size_slope": [_slope(widths, values) for values in size],
            "change_slope": [_slope(widths, values) for values in change],
        }
    return {
        "losses": _finite([[loss for loss, _ in at_step] for at_step in by_step]),
        "parts": parts,
    }


def _finite(table: list[list[float]]) -> list[list[float | None]]:
    return [[value if math.isfinite(value) else None for value in row] for row in table]


def _slope(widths: list[int], values: list[float]) -> float | None:
    """d log value / d log width, by least squares."""
    if not all(math.isfinite(value) and value > 0 for value in values):
        return None
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def print_result(result: dict[str, Any]) -> None:
    """Print a table of slopes for each parametrisation."""
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 100)
    widths = ", ".join(map(str, result["widths"]))
    console.print(
        f"{result['mixer']}, heads of {result['head_size']}, d_model {widths}; learning rate "
        f"{result['learning_rate']:g}, muP from width {result['mup_base_width']}\n"
        "Slopes, d log / d log width: 0 where hyperparameters carry over to another width."
    )
    last = result["steps"]
    after = sorted({round(1 + i * (last - 1) / (_STEPS_SHOWN - 1)) for i in range(_STEPS_SHOWN)})
    for kind, found in result["parametrisations"].items():
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
        table.add_column(f"{_NAMES[kind]}\n", no_wrap=True, min_width=24)
        for first, columns in (("size,\n", [0, *after]), ("  change,\n", after)):
            for i, step in enumerate(columns):
                head = f"{first if i == 0 else chr(10)}step {step}"
                table.add_column(head, justify="right", no_wrap=True)
        for part, values in found["parts"].items():
            slopes = [values["size_slope"][step] for step in (0, *after)]
            slopes += [values["change_slope"][step] for step in after]
            # adding 0 takes the sign from a zero
            table.add_row(part, *("-" if s is None else f"{round(s, 2) + 0:+.2f}" for s in slopes))
        console.print()
        console.print(table)
    console.print(
        "\nSize is the root mean square of an activation, change that of its difference to step 0."
        "\nUnder muP logits start at a slope of -0.5, by design, and leave it as they are learned."
        "\nMany tokens or a narrow base leave slopes somewhat below 0: what of an update does not "
        "add up\nover its inputs falls as 1/sqrt(width)."
    )
