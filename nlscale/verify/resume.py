"""`nlscale verify-resume`: is a run that was killed and resumed the run that never stopped?

Real runs under torchrun, really killed. Each is started as a user would start it; what they leave
behind, their last checkpoints and their metrics, is compared.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlscale.checkpoint import FOLDER
from nlscale.checkpoint.diff import compare
from nlscale.checkpoint.store.store import Checkpoint, Store
from nlscale.cluster.life.place import without_place
from nlscale.config import recipe
from nlscale.config.units import Start
from nlscale.config.vocabulary import Config
from nlscale.errors import TrainingFailed, UserError
from nlscale.levels.spectrum import levels_of
from nlscale.plan.checks import check_sizes
from nlscale.telemetry.figures import SUMMARY_FILE, read_records

_KEYS = ("ranks", "tensor", "pipeline", "virtual_stages", "sequence", "ranks_per_node")
_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Arrangement:
    """How many ranks a run has and how it is spread over them."""

    ranks: int
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Arrangement:
        """Read ``ranks=4,tensor=2``; the keys but `ranks` are those of `parallel`.

        Raises:
            UserError: not of that form.
        """
        given = dict(part.partition("=")[::2] for part in text.split(","))
        unknown = [key for key in given if key not in _KEYS]
        if unknown or not given.get("ranks", "").isdigit():
            raise UserError(
                f"--layout {text!r}: write ranks=N and any of {', '.join(_KEYS[1:])}, "
                f"for example ranks=4,tensor=2"
            )
        keys = {"tensor": "1", "pipeline": "1", "virtual_stages": "1", "sequence": "false"} | given
        ranks = int(keys.pop("ranks"))
        keys.setdefault("ranks_per_node", str(ranks))
        return cls(ranks, tuple(f"parallel.{key}={value}" for key, value in keys.items()))

    def __str__(self) -> str:
        shown = [item.removeprefix("parallel.") for item in self.overrides]
        plain = {"tensor=1", "pipeline=1", "virtual_stages=1", "sequence=false"}
        plain.add(f"ranks_per_node={self.ranks}")
        return ",".join([f"ranks={self.ranks}", *(item for item in shown if item not in plain)])


def verify_resume(
    path: Path,
    overrides: list[str],
    at: int,
    layouts: list[Arrangement],
    ranks: int,
    folder: Path,
) -> dict[str, Any]:
    """Train without a stop; train again, kill after the checkpoint at a step, resume; compare.

    The runs end one longest period and three steps after the checkpoint, with the schedule of a
    run of that length; stages begin at the steps at which they do in the recipe. On the run's own
    layout the comparison is made there, at the end. Another layout sums in another order, and
    training amplifies that rounding from step to step: there it is made one step after the
    checkpoint, where every part of the state has been used once, and what has become of the
    rounding at the end is reported beside it.

    Args:
        path: the recipe.
        overrides: of its keys.
        at: the step of the checkpoint.
        layouts: to resume on beside the run's own; none: two that the recipe allows.
        ranks: of the run itself.
        folder: where the runs go.

    Returns:
        `recipe`, `at`, `steps`, `bitwise` (of the same layout) and `layouts`, one entry each:
        `layout`, `compared_at` (the step), `bitwise`, `max_relative_difference` (the largest of
        the classes and losses: |a - b| / |b| of all tensors of a class together), `classes` (see
        `nlscale.checkpoint.diff.compare`, and `losses` of all steps up to that one) and `at_end`,
        the same at the last step.

    Raises:
        UserError: the recipe, a layout or the step do not fit.
        TrainingFailed: a run failed.
    """
    config = recipe.load(path, overrides, trusted=True).config
    levels = levels_of(config)
    steps = at + max(level.period for level in levels) + 3
    if not 1 <= at <= config.train.steps:
        raise UserError(f"--at {at} is not a step of the run; use 1 to {config.train.steps}")
    common = [
        *overrides,
        *_stages_in_place(config, steps),
        f"train.steps={steps}",
        "checkpoint.every=null",
        f"checkpoint.steps=[{at},{at + 1}]",
        "checkpoint.keep=3",
        "checkpoint.mirror=null",
        "wandb.enabled=false",
    ]
    parallel = config.parallel
    own = Arrangement.parse(
        f"ranks={ranks},tensor={parallel.tensor},pipeline={parallel.pipeline},"
        f"virtual_stages={parallel.virtual_stages},sequence={str(parallel.sequence).lower()}"
    )
    check_sizes(config, ranks)
    layouts = layouts or _others(path, common, own)
    for layout in [own, *layouts]:
        _check_layout(path, common, layout)

    reference, killed = folder / "never-stopped", folder / "killed"
    _note(f"training {steps} steps without a stop, {own}")
    _run(path, common, own, reference)
    _note(f"training again, to be killed after the checkpoint at step {at}")
    _run_and_kill(path, common, own, killed, at)
    entries = []
    for i, layout in enumerate([own, *layouts]):
        resumed = folder / f"resumed-{i}"
        _copy(killed, resumed, at)
        _note(f"resuming at step {at}, {layout}")
        _run(path, common, layout, resumed)
        end = _compare(reference, resumed, steps)
        where = steps if layout == own else at + 1
        found = end if layout == own else _compare(reference, resumed, where)
        entries.append({"layout": str(layout), "compared_at": where, **found, "at_end": end})
    return {
        "recipe": str(path),
        "at": at,
        "steps": steps,
        "bitwise": entries[0]["bitwise"],
        "layouts": entries,
    }


def _stages_in_place(config: Config, steps: int) -> list[str]:
    """Overrides that keep the stages of a run where they are in one of so many steps alone, and
    the places at which periods change."""
    plain = recipe.to_plain(config)
    data, train, warmup = plain["data"], plain["train"], plain["levels"]["period_warmup"]
    key = "levels.period_warmup"
    lists = {
        "data.stages": data["stages"],
        "train.global_batch": train["global_batch"],
        f"{key}.critical_batch": warmup["critical_batch"],
    }
    overrides = []
    for name in ("steps", "cooldown"):
        if warmup[name] is not None:
            place = Start.parse(warmup[name]).in_steps(config.train.steps)
            falls_later = name == "cooldown" and place >= steps
            overrides.append(f"{key}.{name}={'null' if falls_later else f'{place} steps'}")
    for key, stages in lists.items():
        if isinstance(stages, list) and stages:
            places = [Start.parse(stage["from"]).in_steps(config.train.steps) for stage in stages]
            placed = [
                {**stage, "from": f"{place} steps"}
                for place, stage in zip(places, stages, strict=True)
                if place < steps
            ]
            overrides.append(f"{key}={json.dumps(placed)}")
    return overrides


def _check_layout(path: Path, common: list[str], layout: Arrangement) -> None:
    """Refuse a layout on which the run's sizes do not divide."""
    config = recipe.load(path, [*common, *layout.overrides], trusted=True).config
    check_sizes(config, layout.ranks)


def _others(path: Path, common: list[str], own: Arrangement) -> list[Arrangement]:
    """Two other layouts that the recipe allows."""
    found: list[Arrangement] = []
    for text in (
        "ranks=2,tensor=2", "ranks=4", "ranks=1", "ranks=2", "ranks=4,tensor=2,pipeline=2",
        "ranks=2,pipeline=2",
    ):  # fmt: skip
        layout = Arrangement.parse(text)
        try:
            _check_layout(path, common, layout)
        except UserError:
            continue
        if layout != own:
            found.append(layout)
    return found[:2]


def _run(path: Path, overrides: list[str], layout: Arrangement, run_dir: Path) -> None:
    with _started(path, overrides, layout, run_dir) as process:
        if process.wait():
            raise _failure(process, run_dir)


def _run_and_kill(
    path: Path, overrides: list[str], layout: Arrangement, run_dir: Path, at: int
) -> None:
    store = Store(run_dir / FOLDER)
    with _started(path, overrides, layout, run_dir) as process:
        while process.poll() is None:
            if any(checkpoint.step == at for checkpoint in store.checkpoints()):
                break
            time.sleep(_POLL_SECONDS)
        if process.poll():
            raise _failure(process, run_dir)
    if not (run_dir / SUMMARY_FILE).exists():
        return
    raise TrainingFailed("the run ended before it could be killed; nothing was verified")


@contextmanager
def _started(
    path: Path, overrides: list[str], layout: Arrangement, run_dir: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A run in processes of its own; those that are left at the end are killed, all at once."""
    run_dir.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(layout.ranks), "-m", "nlscale", "train", str(path)),
        *(*overrides, *layout.overrides, f"run.dir={run_dir}"),
    ]
    # torchrun would leave an empty folder for logs behind
    environment = {"OMP_NUM_THREADS": "1", "PET_LOG_DIR": os.devnull, **without_place(os.environ)}
    with open(_log(run_dir), "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            for pid in family(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def _log(run_dir: Path) -> Path:
    return run_dir / "output.log"


def _failure(process: subprocess.Popen[bytes], run_dir: Path) -> TrainingFailed:
    lines = _log(run_dir).read_text(errors="replace").splitlines()
    ours = [line for line in lines if line.startswith("nlscale: ")]
    said = ours[:1] or lines[-20:]
    return TrainingFailed(
        f"the run in {run_dir} ended with exit code {process.returncode}:\n" + "\n".join(said)
    )


def family(pid: int) -> list[int]:
    """A process and all that descend from it, itself first."""
    found = [pid]
    for parent in found:
        children = Path(f"/proc/{parent}/task/{parent}/children")
        with suppress(OSError):  # it may end meanwhile
            found += map(int, children.read_text().split())
    return found


def _copy(killed: Path, resumed: Path, at: int) -> None:
    """What the killed run left, without a checkpoint that it may have begun after that step."""
    shutil.copytree(killed, resumed)
    for checkpoint in Store(resumed / FOLDER).checkpoints():
        if checkpoint.step > at:
            shutil.rmtree(checkpoint.path)


def _compare(reference: Path, resumed: Path, step: int) -> dict[str, Any]:
    """Of the states after a step, and of the losses up to it."""
    result = compare(_checkpoint(resumed, step), _checkpoint(reference, step))
    classes = result["classes"]
    losses = _losses(reference, step), _losses(resumed, step)
    if losses[0].keys() != losses[1].keys():
        raise TrainingFailed(f"the metrics of {resumed} do not show every step once")
    worst = max(abs(losses[1][step] - loss) / loss for step, loss in losses[0].items())
    classes["losses"] = {
        "bitwise": losses[0] == losses[1],
        "relative_difference": worst,
    }
    return {
        "bitwise": all(found["bitwise"] for found in classes.values()),
        "max_relative_difference": max(
            found.get("relative_difference", 0.0) for found in classes.values()
        ),
        "classes": classes,
    }


def _checkpoint(run_dir: Path, step: int) -> Checkpoint:
    (checkpoint,) = (c for c in Store(run_dir / FOLDER).checkpoints() if c.step == step)
    checkpoint.verify()
    return checkpoint


def _losses(run_dir: Path, last: int) -> dict[int, float]:
    """Training losses up to a step; one that is there twice counts as no number."""
    losses: dict[int, float] = {}
    for record in read_records(run_dir):
        step = record.get("step", 0)
        if record.get("kind") == "train" and step <= last:
            loss = record.get("loss")
            losses[step] = math.nan if step in losses or loss is None else loss
    return losses


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
