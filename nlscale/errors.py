"""The exceptions a user is meant to read, and the exit codes of the command line."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: a wrong key, a missing file, sizes that do not divide.

    The command line prints the message as one line and exits with code 2, without a traceback.
    The message names what is wrong, where, and what would be right.
    """

    exit_code = 2
    everywhere = False
    """Whether all ranks raise it alike, so that only the first has to say it."""


class TrainingFailed(UserError):
    """A run that was well asked for but cannot go on, such as one whose loss is not finite.

    Printed the same way, with exit code 3.
    """

    exit_code = 3


class Stopped(UserError):
    """The run was asked to stop, and did, after a checkpoint: the same command goes on."""

    everywhere = True
    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: not done, and worth starting again."""
