"""How a command ends: with one line and an exit code of its own, never with half a traceback.

Exit codes: 0 done, 2 something to mend in what was asked (one line says what), 3 the training
failed, 4 a job gave up after restarts without progress, 5 a rank was lost or hung, 75 stopped on
request with a checkpoint, 130 interrupted, 1 anything else (with a traceback).
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

from nlscale.errors import SaidElsewhere, UserError

_OTHERS_WAIT_SECONDS = 3.0


def quiet() -> None:
    """Keep libraries from announcing at import, on every rank, what they do without."""
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def exit_with(work: Callable[[], int]) -> NoReturn:
    """Do it and exit with the code that it returns, or that its error has."""
    try:
        sys.exit(work())
    except SaidElsewhere as error:
        sys.exit(error.exit_code)
    except UserError as error:
        if error.told or _speaks_for_its_node():
            print(f"nlscale: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("nlscale: interrupted", file=sys.stderr)
        sys.exit(130)


def _speaks_for_its_node() -> bool:
    """Whether this process says what failed before the ranks had met.

    Ranks of a node fail alike then, and cannot agree on who says so: the first does. torchrun ends
    the others when it has; what only they have to say is said a little later.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return True
    time.sleep(_OTHERS_WAIT_SECONDS)
    return "TORCHELASTIC_RUN_ID" in os.environ
