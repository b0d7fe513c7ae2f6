"""One rank of a run that `nlscale.train.processes` has started: `nlscale`, and two things more.

It leaves the reason for which it ends in a pipe to that process, and when that process is gone,
it stops like a run that was told to. It is called with the number of that pipe and the arguments of
`nlscale`; standard input is a pipe that stays open as long as the other side lives.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import threading

from nlscale.cluster.life.exits import leave
from nlscale.errors import SaidElsewhere, UserError
from nlscale.train.processes import MOST_REASON_BYTES


def main() -> None:
    """Run the command line; ends as that does."""
    reason = int(sys.argv.pop(1))
    os.set_inheritable(reason, False)
    threading.Thread(target=_stop_when_alone, daemon=True).start()
    try:
        runpy.run_module("nlscale")["main"]()
    except SystemExit as end:
        # `nlscale.cluster.life.exits` exits while it handles what was raised
        why = end.__context__
        if isinstance(why, UserError) and not isinstance(why, SaidElsewhere):
            with contextlib.suppress(OSError):  # nobody reads any more
                os.write(reason, str(why).encode()[:MOST_REASON_BYTES])
        leave(end)


def _stop_when_alone() -> None:
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
