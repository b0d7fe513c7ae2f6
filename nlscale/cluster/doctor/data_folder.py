"""The data folder: whole, and the same on every node."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from nlscale.cluster.doctor.findings import Finding, Grade, merged, plural
from nlscale.config.units import human_bytes, human_count
from nlscale.errors import UserError

_CHECK = "data"


@dataclass(frozen=True)
class Data:
    """What one host sees of the folder."""

    path: str
    trouble: str | None
    """Why it cannot be trained on; None: it can."""
    fingerprint: str = ""
    """Of the checksums of all shards."""
    tokens: int = 0
    shards: int = 0
    bytes: int = 0


def probe(path: Path) -> Data:
    """Read the index, see that every shard has its size, and read both ends of each split."""
    from nlscale.data.index import read_index
    from nlscale.data.shards import TokenShards

    try:
        index = read_index(path)
        for name in index["splits"]:
            split = TokenShards(path, name, verify=False)
            split.read(0, 1)
            split.read(split.tokens - 1, 1)
            split.close()
    except UserError as error:
        return Data(str(path), str(error))
    shards = [shard for split in index["splits"].values() for shard in split["shards"]]
    return Data(
        path=str(path),
        trouble=None,
        fingerprint=hashlib.sha256("".join(s["sha256"] for s in shards).encode()).hexdigest(),
        tokens=sum(split["tokens"] for split in index["splits"].values()),
        shards=len(shards),
        bytes=sum(shard["size_bytes"] for shard in shards),
    )


def judge(found: dict[str, Data]) -> list[Finding]:
    """Whether all hosts can read it, and read the same."""
    whole = [data.fingerprint for data in found.values() if data.trouble is None]
    usual = Counter(whole).most_common(1)[0][0] if whole else ""
    findings = []
    for host, data in found.items():
        if data.trouble is not None:
            reason, _, fix = data.trouble.partition("; ")
            advice = f"{fix}; or give --data the folder that all nodes see" if fix else ""
            findings.append(Finding(_CHECK, Grade.error, reason, advice, (host,)))
        elif data.fingerprint != usual:
            findings.append(
                Finding(
                    _CHECK,
                    Grade.error,
                    f"{data.path} holds other data than on the other nodes",
                    "copy one folder to all nodes, or share it",
                    (host,),
                )
            )
        else:
            measured = (
                f"{data.path}: {human_count(data.tokens)} tokens, {human_bytes(data.bytes)} in "
                f"{plural(data.shards, 'shard')} of the right size; checksums are compared when "
                f"training starts"
            )
            findings.append(Finding(_CHECK, Grade.ok, measured, hosts=(host,)))
    return merged(findings, found)
