"""Where this rank is, as torchrun, launch/slurm or DeepSpeed's launcher says in the environment."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from nlscale.errors import UserError

_ADVICE = "start with torchrun or launch/slurm"


@dataclass(frozen=True)
class Place:
    """Where a rank is among all, and where they meet."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    """MASTER_ADDR."""
    port: int
    """MASTER_PORT."""
    opens_store: bool = False
    """Whether it opens the store in which the ranks meet: the first does, unless torchrun has."""
    restart: str = "0"
    """Which of torchrun's starts this is: its store keeps what the one before left there."""

    @property
    def meeting_point(self) -> str:
        """Where the store is, `address:port`."""
        return f"{self.address}:{self.port}"

    @property
    def who(self) -> str:
        """The rank and its host, in words."""
        return f"rank {self.rank} on {socket.gethostname()}"


def read_place(wrong: str = f"is not a number; {_ADVICE}") -> Place:
    """This rank's place; a local rank or world that is not said counts as 0 of 1.

    Args:
        wrong: what to say of a value that is not a number.

    Raises:
        UserError: a variable is missing, or not a number.
    """

    def text(name: str, otherwise: str = "") -> str:
        value = os.environ.get(name) or otherwise
        if not value:
            raise UserError(f"RANK is set but {name} is not; {_ADVICE}")
        return value

    def number(name: str, otherwise: str = "") -> int:
        value = text(name, otherwise)
        if not value.isdigit():
            raise UserError(f"{name}={value!r} {wrong}")
        return int(value)

    rank = number("RANK")
    return Place(
        rank=rank,
        local_rank=number("LOCAL_RANK", "0"),
        world=number("WORLD_SIZE"),
        local_world=number("LOCAL_WORLD_SIZE", "1"),
        address=text("MASTER_ADDR"),
        port=number("MASTER_PORT"),
        opens_store=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        restart=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )
