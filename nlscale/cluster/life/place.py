"""Where this rank is among all: the one place that reads what a launcher says in the environment.

torchrun, launch/slurm and DeepSpeed's launcher give every rank the same few variables. A run takes
its rank, the number of ranks and the meeting point from here and from nowhere else, so that no two
parts of it can take them differently; and what is only half said, or cannot be, is refused before
anything is written. Without any of them this process is rank 0 of 1.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from nlscale.errors import UserError

_LOCAL_WORLD = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
"""Ranks of a node, by torchrun and launch/slurm, and by DeepSpeed's launcher."""
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", *_LOCAL_WORLD)
"""A process that has none of them is alone."""
VARIABLES = (
    *(*_OF_A_RANK, "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
    *("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"),
)
"""All that launchers say; who starts ranks of its own takes them away first."""
_TASKS = (
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpirun", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    ("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
)
"""What starts several processes without the variables of a rank: how many, which, which here.

SLURM_NTASKS is not among them: the script of a job has it too, which is one process.
"""
_START = "start with `sbatch launch/slurm/train.sbatch` or torchrun, which set all of them"
_OF_ITS_NODE = (
    "which of the ranks of its node is this? Where a node has one, LOCAL_RANK=0 LOCAL_WORLD_SIZE=1."
)
_QUESTIONS = {
    "RANK": "which rank is this?",
    "WORLD_SIZE": "how many ranks are there?",
    "LOCAL_RANK": _OF_ITS_NODE,
    "LOCAL_WORLD_SIZE": _OF_ITS_NODE,
    "MASTER_ADDR": "where do the ranks meet?",
    "MASTER_PORT": "where do the ranks meet?",
}
"""What nobody knows where a variable is not set."""
_MOST_DIGITS = 9
_PORTS = range(1, 65536)


@dataclass(frozen=True)
class Place:
    """Where a rank is among all, and where they meet; as it stands, rank 0 of 1."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: str = ""
    """MASTER_ADDR; empty where there is nobody to meet."""
    port: int = 0
    """MASTER_PORT."""
    torchrun_has_store: bool = False
    """Whether the store in which the ranks meet is of torchrun, which outlives them."""
    restart: str = "0"
    """Which of torchrun's starts this is: its store keeps what the one before left there."""

    @property
    def meets(self) -> bool:
        """Whether it was started as a rank that has others, or itself, to meet at an address."""
        return bool(self.address)

    @property
    def opens_store(self) -> bool:
        """Whether it opens the store in which the ranks meet: the first, unless torchrun has."""
        return self.rank == 0 and self.meets and not self.torchrun_has_store

    @property
    def meeting_point(self) -> str:
        """Where the store is, `address:port`."""
        return f"{self.address}:{self.port}"

    @property
    def who(self) -> str:
        """The rank and its host, in words."""
        return f"rank {self.rank} on {socket.gethostname()}"


def place() -> Place:
    """This rank's place.

    Raises:
        UserError: the variables of a rank are set in part, empty, no numbers, or contradict each
            other; or none is set and this process is one of several all the same.
    """
    said = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if not any(name in said for name in _OF_A_RANK):
        _refuse_tasks()
        return Place()
    rank, world = _number(said, "RANK"), _number(said, "WORLD_SIZE")
    several = world > 1
    local_rank = _number(said, "LOCAL_RANK", several)
    local_world = _local_world(said, several)
    if world < 1 or rank >= world:
        raise _contradict(f"RANK={rank} is not one of WORLD_SIZE={world}; ranks count from 0")
    if local_world < 1 or local_rank >= local_world:
        raise _contradict(
            f"LOCAL_RANK={local_rank} is not one of LOCAL_WORLD_SIZE={local_world}, the ranks of "
            f"this node; they count from 0"
        )
    if local_world > world:
        raise _contradict(
            f"LOCAL_WORLD_SIZE={local_world} ranks of one node are more than WORLD_SIZE={world} "
            f"in all; see who starts the ranks"
        )
    address, port = _meeting_point(said, several)
    theirs = said.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restart = said.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Place(rank, world, local_rank, local_world, address, port, theirs, restart)


def without_place(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what launchers say, for a process that has a place of its own.

    It does not count as one of several that know nothing of each other either.
    """
    said = {*VARIABLES, *(count for _, count, _, _ in _TASKS)}
    return {name: value for name, value in environment.items() if name not in said}


def alone(verb: str) -> None:
    """Refuse to be one of several ranks: what `verb` does is done once, by one process.

    Args:
        verb: what is called, such as `nlscale sweep`.

    Raises:
        UserError: this process is one of several, or `place` cannot tell.
    """
    here = place()
    if here.world > 1:
        raise UserError(
            f"{verb} is for one process, and this one is rank {here.rank} of {here.world} (RANK, "
            f"WORLD_SIZE); call it once, without torchrun or srun"
        )


def is_first_of_its_node() -> bool:
    """Whether this process speaks for those beside it; known also where `place` refuses."""
    names = ("LOCAL_RANK", *(here for _, _, _, here in _TASKS))
    number = next((os.environ[name] for name in names if os.environ.get(name)), "0")
    return not _is_number(number) or int(number) == 0


def ended_by_a_launcher() -> bool:
    """Whether what started this rank ends the others when one has failed, as torchrun does."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _number(said: dict[str, str], name: str, needed: bool = True) -> int:
    """A count; where it is neither said nor needed, that of a single rank."""
    if name not in said:
        if needed:
            raise _half_set(said, name)
        return 1 if name in _LOCAL_WORLD else 0
    value = said[name]
    if not _is_number(value):
        raise _contradict(f"{name}={value!r} is not a whole number; unset it, or {_START}")
    return int(value)


def _is_number(value: str) -> bool:
    return value.isascii() and value.isdigit() and len(value) <= _MOST_DIGITS


def _local_world(said: dict[str, str], needed: bool) -> int:
    names = [name for name in _LOCAL_WORLD if name in said] or [_LOCAL_WORLD[0]]
    values = {name: _number(said, name, needed) for name in names}
    if len(set(values.values())) > 1:
        both = " and ".join(f"{name}={value}" for name, value in values.items())
        raise _contradict(f"{both} disagree on the ranks of this node; unset one")
    return values[names[0]]


def _meeting_point(said: dict[str, str], needed: bool) -> tuple[str, int]:
    """Address and port; empty and 0 for a single rank that was given neither."""
    if not needed and not {"MASTER_ADDR", "MASTER_PORT"} <= said.keys():
        return "", 0
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in said:
            raise _half_set(said, name)
    address, port = said["MASTER_ADDR"], said["MASTER_PORT"]
    if not address or not address.isprintable() or any(c.isspace() for c in address):
        raise _contradict(
            f"MASTER_ADDR={address!r} is not the name or address of a host; set it to those of the "
            f"first node"
        )
    if not _is_number(port) or int(port) not in _PORTS:
        raise _contradict(
            f"MASTER_PORT={port!r} is not a port, 1 to {_PORTS[-1]}; choose a free one, the same "
            f"on all nodes"
        )
    return address, int(port)


def _half_set(said: dict[str, str], missing: str) -> UserError:
    """What a rank lacks; where none is told its own number, the first task of a node says so."""
    given = ", ".join(f"{name}={said[name]}" for name in _OF_A_RANK if name in said)
    why = ""
    if missing == "RANK" and "WORLD_SIZE" in said:
        why = " (often exported in the header of an sbatch script, where it says nothing of ranks)"
    error = UserError(
        f"{given} is set{why} and {missing} is not: {_QUESTIONS[missing]} Unset them for a run of "
        f"one process, or {_START}"
    )
    error.told = "LOCAL_RANK" in said or "RANK" in said
    return error


def _contradict(message: str) -> UserError:
    """What is wrong of this rank alone: it speaks for itself."""
    error = UserError(message)
    error.told = True
    return error


def _refuse_tasks() -> None:
    """Refuse to be one of several processes that know nothing of each other."""
    for launcher, count, which, _ in _TASKS:
        number, index = os.environ.get(count, ""), os.environ.get(which)
        if index is not None and _is_number(number) and int(number) > 1:
            raise UserError(
                f"this is process {index} of {number} that {launcher} started ({count}), and RANK "
                f"and WORLD_SIZE are not set: each would do all of it; {_START}, or start one "
                f"process"
            )
