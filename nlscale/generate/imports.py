"""The import of torch and megatron-core by a command that needs a model."""

from __future__ import annotations

from nlscale.cluster.life.imports import importing


def import_models() -> None:
    """Import all that a model is made of, at once, in a process that is there for one command.

    It comes before any other import of it: megatron-core, imported by the first module that names
    it, brings the compiler and wandb along.
    """
    with importing():
        from nlscale.parallel.cpu import import_megatron_core  # imports torch

        import_megatron_core()
        import nlscale.generate.load  # noqa: F401
