"""The environment of a rank, as a launcher makes it, for tests of one process."""

from __future__ import annotations

import pytest

from nlscale.cluster.life.place import VARIABLES


def variables(
    rank: int, ranks: int, per_node: int | None = None, port: int = 29500
) -> dict[str, str]:
    """What torchrun says to a rank."""
    node = per_node or ranks
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank % node),
        "LOCAL_WORLD_SIZE": str(node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def stand(monkeypatch: pytest.MonkeyPatch, **said: object) -> None:
    """Give this process these variables of a rank and no others."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, str(value))


def stand_at(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int) -> None:
    """Let this process be that rank."""
    stand(monkeypatch, **variables(rank, ranks))
