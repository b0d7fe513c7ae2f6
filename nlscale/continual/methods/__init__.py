"""Methods against forgetting. Importing it adds their hooks; no torch is imported.

The runs of a stream name it in `run.imports`.
"""

from nlscale.continual.methods.options import (
    EwcOptions,
    FreezeOptions,
    LearnOptions,
    LwfOptions,
    ScoresOptions,
)
from nlscale.continual.metrics import LEARN
from nlscale.train.hooks.options import NoOptions
from nlscale.train.hooks.table import register

register("task-scores", "nlscale.continual.methods.scores:Scores", ScoresOptions)
register("ewc", "nlscale.continual.methods.ewc:Ewc", EwcOptions, one_length=True)
register("lwf", "nlscale.continual.methods.lwf:Lwf", LwfOptions)
register("freeze", "nlscale.continual.methods.freeze:Freeze", FreezeOptions)
register("reset-optimizer", "nlscale.continual.methods.reset:ResetOptimizer", NoOptions)
register(LEARN, "nlscale.continual.methods.learning:Learn", LearnOptions, one_length=True)
