"""`python -m nlscale` is `nlscale`: one command, and the end of its process."""

from nlscale.cli import main
from nlscale.cluster.life.exits import leave


def program() -> None:
    """Run the command that the process was started for; what it did not expect is a traceback."""
    try:
        main()
    except SystemExit as end:
        leave(end)


if __name__ == "__main__":
    program()
