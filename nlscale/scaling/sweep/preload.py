"""What the process imports from which runs are forked: all that a run needs, once for all runs."""

from nlscale.cluster.life.exits import quiet

quiet()

from nlscale.parallel.cpu import import_megatron_core  # noqa: E402

import_megatron_core()

import nlscale.train.loop  # noqa: E402, F401
