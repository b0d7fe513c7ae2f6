"""nlscale: pretraining of Hope / Nested-Learning models, organised by levels of update period.

From Python, `load` gives a trained model, `read` what a run has written, and `start` trains one;
docs/how-to/use-from-python.md shows them. Importing nlscale imports no torch. Hugging Face
transformers, imported before or after, knows the class of exported models then.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nlscale.checkpoint.export.registration import register_when_imported

if TYPE_CHECKING:
    import torch

    from nlscale.generate.model import Model
    from nlscale.train.folder import Run

__all__ = ["load", "read", "start"]
__version__ = "0.1.0"

register_when_imported()


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Model:
    """A trained model in this process, without process groups of its own to begin or end.

    A mixer of someone's package is to be imported first: what a checkpoint names is not imported,
    and nothing that it holds is run.

    Args:
        path: folder of a run, whose newest whole checkpoint it is (a broken one is passed over,
            with a warning); of a checkpoint, written on any layout; or of an export. Checkpoints
            are verified by their checksums.
        device: where it computes; None: the current GPU, or the CPU where there is none.
        dtype: of weights and activations, torch.float32, bfloat16 or float64; None: that in which
            the model was trained, of an export that of its weights.

    Raises:
        UserError: there is no model; it needs a package that was not imported; or torch.distributed
            has begun here with several ranks.
        CheckpointError: (a UserError) no checkpoint is whole.
    """
    import warnings

    from nlscale.cluster.life.exits import quiet
    from nlscale.generate.given import check_folder

    check_folder(path)
    with warnings.catch_warnings():
        quiet()
        from nlscale.parallel.cpu import import_megatron_core  # imports torch

        import_megatron_core()
        from nlscale.generate import load as loading

        return loading.load(path, device, dtype)


def read(path: str | Path) -> Run:
    """What a run has written, finished or under way. Imports no torch.

    Args:
        path: its folder, `run.dir`.

    Raises:
        UserError: no run is there.
    """
    from nlscale.train import folder

    return folder.read(path)


def start(recipe: str | Path, *overrides: str, ranks: int = 1, imports: Sequence[str] = ()) -> Run:
    """Train a recipe in processes of its own on this machine, and return the finished run.

    It is what `torchrun --standalone --nproc-per-node RANKS -m nlscale train RECIPE KEY=VALUE ...`
    trains; its output appears as it comes. A run that has finished before is returned as it is,
    and one that was stopped goes on.

    Args:
        recipe: path of a recipe, or the name of one that comes with nlscale.
        overrides: `key=value`, as on the command line.
        ranks: how many processes train together; on GPUs one each.
        imports: modules that add mixers, optimizer rules or evaluations; imported here too.

    Raises:
        UserError: what was asked for cannot be trained; one line says what to mend.
        TrainingFailed: it began and could not go on.
        LostRank: a rank was lost or hung.
        Stopped: it was told to stop by another than this process; the same call goes on.
        KeyboardInterrupt: Ctrl-C, after the run has saved; a second one does not wait for that.
    """
    from nlscale.train import processes

    return processes.start(recipe, overrides, ranks, imports)
