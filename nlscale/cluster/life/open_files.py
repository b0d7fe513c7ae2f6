"""How many files, sockets among them, a rank holds open; and it may: a start raises its own limit.

A process has two limits: the soft one, at which it fails, and the hard one, up to which it may
raise the soft one. Many systems start it with a soft limit of 1,024.
"""

from __future__ import annotations

import os
import resource
from contextlib import suppress

from nlscale.cluster.life.place import Place
from nlscale.errors import UserError

_OF_ITS_OWN = 512
"""Shards, libraries, and what NCCL opens in a rank for itself."""
_IN_THE_STORE = 4
"""Connections of a rank to the store: its own, two of its watch, one of torch's watch over NCCL."""
_AMONG_RANKS = 1
"""Of a rank to each other one, over gloo: where it gathers what all have to say."""


def needed(ranks: int, store: bool) -> int:
    """How many files a process holds open at most.

    Args:
        ranks: of the run.
        store: whether the process has the store in which they meet, as the first rank's has.
    """
    return _OF_ITS_OWN + ranks * (_AMONG_RANKS + _IN_THE_STORE * store)


def raise_soft_limit(process: int = 0) -> int:
    """Raise the soft limit of a process, by default of this one, to its hard limit.

    Returns:
        The hard limit; `resource.RLIM_INFINITY` where there is none.
    """
    _, hard = resource.prlimit(process, resource.RLIMIT_NOFILE)
    resource.prlimit(process, resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def allow(here: Place) -> None:
    """Let this rank open as many files as it will need in the run.

    Raises:
        UserError: it may not, or not as many as the first rank needs, which has the store.
    """
    # Whatever this rank needs itself: one that refused alone would leave the others waiting for it.
    wanted, hard = needed(here.world, store=here.world > 1), raise_soft_limit()
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UserError(
            f"{here.who} may open at most {hard:,} files, and with {here.world:,} ranks the first "
            f"needs {wanted:,}; raise the hard limit: {how_to_raise(wanted)}"
        )
    if here.torchrun_has_store and here.rank == 0:
        # It is in the agent that started this rank, has the same hard limit, and raises nothing.
        with suppress(OSError):  # of another user's, or where that is forbidden: as it was started
            raise_soft_limit(os.getppid())


def how_to_raise(wanted: int) -> str:
    """Who raises a hard limit, and where."""
    return (
        f"as root `ulimit -n {wanted}` before the ranks start, nofile in "
        f"/etc/security/limits.conf, or LimitNOFILE of the service that starts them (slurmd, with "
        f"PropagateResourceLimitsExcept=NOFILE in slurm.conf)"
    )
