"""What the process imports from which runs are forked: all that a run needs, once for all runs."""

from nlscale.cluster.life.exits import quiet
from nlscale.cluster.life.imports import importing

quiet()

with importing():
    from nlscale.parallel.cpu import import_megatron_core

    import_megatron_core()

    # of the figure that every run ends with
    import matplotlib.backends.backend_agg
    import matplotlib.figure
    import matplotlib.ticker  # noqa: F401

    # of the first model and the first checkpoint
    import megatron.core.models.backends
    import megatron.core.transformer.multi_token_prediction  # noqa: F401
    import numpy.random  # noqa: F401
    import torch._dynamo  # which the first optimizer would import
    import torch.utils.serialization  # noqa: F401

    import nlscale.evaluate.loss
    import nlscale.model.mixers.attention.module
    import nlscale.model.mixers.memory.module
    import nlscale.optim.adamw
    import nlscale.train.loop  # noqa: F401
    from nlscale.config.schema import structured
    from nlscale.config.vocabulary import Config

    structured(Config)  # which the recipe of every run is merged into
