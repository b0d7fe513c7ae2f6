"""The exceptions a user is meant to read, and the exit codes of the command line."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: a wrong key, a missing file, sizes that do not divide.

    The command line prints the message as one line and exits with code 2, without a traceback.
    The message names what is wrong, where, and what would be right.
    """

    exit_code = 2
    echo = False
    """Whether it may only follow from what another rank has to say."""
    told = False
    """Whether the ranks have agreed that this one says why the run ends."""


class TrainingFailed(UserError):
    """A run that was well asked for but cannot go on, such as one whose loss is not finite.

    Printed the same way, with exit code 3.
    """

    exit_code = 3


class GaveUp(UserError):
    """A job that was started again and again without getting to a new checkpoint. Exit code 4."""

    exit_code = 4


class LostRank(UserError):
    """A rank was lost or hangs, or never came; starting again may help. Exit code 5."""

    exit_code = 5
    told = True


class SaidElsewhere(UserError):
    """Another rank says why the run ends; this one ends with the same exit code, and is silent."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Stopped(UserError):
    """The run was asked to stop, and did, after a checkpoint: the same command goes on."""

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: not done, and worth starting again."""
