"""The one exception a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: a wrong key, a missing file, sizes that do not divide.

    The command line prints the message as one line and exits with code 2, without a traceback.
    The message names what is wrong, where, and what would be right.
    """
