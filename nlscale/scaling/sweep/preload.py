"""What the process imports from which runs are forked: all that a run needs, once for all runs."""

import warnings

warnings.filterwarnings("ignore", category=UserWarning, module="megatron")  # as nlscale.cli does

import nlscale.train  # noqa: E402, F401
