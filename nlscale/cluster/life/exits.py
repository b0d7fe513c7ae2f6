"""How a command ends: with one line and an exit code of its own, never with half a traceback.

Exit codes: 0 done, 2 something to mend in what was asked (one line says what), 3 the training
failed, 4 a job gave up after restarts without progress, 5 a rank was lost or hung, 75 stopped on
request with a checkpoint, 130 interrupted, 1 anything else (with a traceback, because what was
printed could not be written, because some of the models that were asked have no answer, or because
data that were verified are not whole).
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

from nlscale.cluster.life.place import ended_by_a_launcher, is_first_of_its_node
from nlscale.errors import SaidElsewhere, UserError
from nlscale.telemetry import screen

_OTHERS_WAIT_SECONDS = 3.0
_LOST_OUTPUT = 1


def quiet() -> None:
    """Keep libraries from announcing at import, on every rank, what they do without."""
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def exit_with(
    work: Callable[[], int], output_is_result: Callable[[], bool] = lambda: False
) -> NoReturn:
    """Do it and exit with the code that it returns, or that its error has.

    Standard output and standard error may break meanwhile: see `nlscale.telemetry.screen`.

    Args:
        work: returns the exit code.
        output_is_result: whether what was printed is what the command was called for, asked when
            it has ended well: then what could not be written is a failure.
    """
    screen.guard()
    try:
        code = _ended_well(work)
    except SaidElsewhere as error:
        sys.exit(error.exit_code)
    except UserError as error:
        if error.told or _speaks_for_its_node():
            print(f"nlscale: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("nlscale: interrupted", file=sys.stderr)
        sys.exit(130)
    lost = screen.lost_output()
    if lost is not None and code == 0 and output_is_result():
        print(
            f"nlscale: standard output could not be written ({lost}); what arrived is not whole",
            file=sys.stderr,
            flush=True,
        )
        code = _LOST_OUTPUT
    sys.exit(code)


def leave(end: SystemExit) -> NoReturn:
    """End the process when it has done all that is done at an end, but the taking apart.

    Threads are waited for, what libraries registered for the end is called, the streams are
    flushed. Python would then take every module and object apart, one after the other, before the
    system takes the memory as a whole: a second for torch and megatron-core.
    """
    code = 0
    if isinstance(end.code, int):
        code = end.code
    elif end.code is not None:  # a text, which Python says as well
        print(end.code, file=sys.stderr)
        code = 1
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    finally:  # interrupted, too
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        ctypes.CDLL(None).fflush(None)  # what libraries in C have not written
        os._exit(code)


def _ended_well(work: Callable[[], int]) -> int:
    """What it returns; `--help` and `--version` exit by themselves."""
    try:
        return work()
    except SystemExit as end:
        if end.code:
            raise
        return 0


def _speaks_for_its_node() -> bool:
    """Whether this process says what failed before the ranks had met.

    Ranks of a node fail alike then, and cannot agree on who says so: the first does. torchrun ends
    the others when it has; what only they have to say is said a little later.
    """
    if is_first_of_its_node():
        return True
    time.sleep(_OTHERS_WAIT_SECONDS)
    return ended_by_a_launcher()
