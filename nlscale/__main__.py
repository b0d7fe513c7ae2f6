"""`python -m nlscale` is `nlscale`: one command, and the end of its process."""

import sys

_INTERRUPTED = 130


def main() -> None:
    """Run the command that the process was started for; ends in SystemExit, or what is unexpected.

    Ctrl-C ends it with one line also while nlscale's own modules are imported, which is why they
    are imported here.
    """
    try:
        from nlscale.cli import main as run
    except KeyboardInterrupt:
        print("nlscale: interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    run()


def program() -> None:
    """`main`, and the end of the process; what it did not expect is a traceback."""
    try:
        main()
    except SystemExit as end:
        from nlscale.cluster.life.exits import leave

        leave(end)


if __name__ == "__main__":
    program()
