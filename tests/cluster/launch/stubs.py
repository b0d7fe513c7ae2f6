"""Slurm's commands as stubs that note what they are given: scripts run here as on a cluster."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

_STUBS = {
    # What comes before `env` are options of srun's; the rest is what a rank runs.
    "srun": """
while [ "$1" != env ]; do printf '%s\\0' "$1" >> "$NOTES/srun"; shift; done
export SLURM_PROCID=0 SLURM_LOCALID=0
exec "$@"
""",
    "scontrol": """
case $1 in
requeue) echo "$2" >> "$NOTES/requeued"; exit "${REQUEUE_CODE:-0}" ;;
--oneliner) echo "NodeName=n0 NodeAddr=192.0.2.7 NodeHostName=n0" ;;
*) if [ "$2" = config ]; then echo "$CONFIG"; else echo n0; fi ;;
esac
""",
    "squeue": """
echo "$TZ $SLURM_TIME_FORMAT $*" > "$NOTES/squeue"
printf '%b' "${ENDS:-}"
""",
    "sleep": "",
    "sbatch": """
printf '%s\\0' "$@" >> "$NOTES/sbatch"
env -0 > "$NOTES/sbatch-environment"
if [ -n "${REFUSES:-}" ] && [ "$(grep -cz parsable "$NOTES/sbatch")" -ge "$REFUSES" ]; then
    printf 'sbatch: error: QOSMaxSubmitJobPerUserLimit\\nsbatch: error: Job violates policy\\n' >&2
    exit 1
fi
[ -z "${WARNING:-}" ] || echo "$WARNING" >&2
echo "${NUMBER-7}"
""",
    "python": """
printf '%s\\0' "$@" > "$NOTES/arguments"
env -0 > "$NOTES/environment"
exit "${CODE:-0}"
""",
}


@dataclass
class Stubs:
    """A folder of stubs, what they noted, and the variables of the scripts that call them."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.notes.mkdir(parents=True)
        self.bin.mkdir()
        for name, text in _STUBS.items():
            (self.bin / name).write_text(f"#!/usr/bin/env bash\n{text}")
            (self.bin / name).chmod(0o755)
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM", "SBATCH"))}
        self.variables = {
            **kept,
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "NOTES": str(self.notes),
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NODELIST": "n0",
            "SLURM_NTASKS": "8",
            "SLURM_JOB_NUM_NODES": "2",
            **self.variables,
        }

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    @property
    def notes(self) -> Path:
        return self.folder / "notes"

    @property
    def setup(self) -> str:
        """A `launch.setup` that finds the stub of Python."""
        return f"export PATH='{self.bin}':\"$PATH\"; echo setup >> '{self.notes}/setups'"

    def words(self, name: str) -> list[str]:
        """What a command was called with, all calls one after the other."""
        path = self.notes / name
        return path.read_text(encoding="utf-8").split("\0")[:-1] if path.exists() else []

    def environment(self, name: str = "environment") -> dict[str, str]:
        """The variables that a command saw."""
        text = (self.notes / name).read_text(encoding="utf-8")
        return dict(entry.split("=", 1) for entry in text.split("\0")[:-1])

    def run(
        self, script: str, *arguments: str, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a batch script as Slurm would."""
        path = self.folder / "script"
        path.write_text(script, encoding="utf-8")
        return subprocess.run(
            ["bash", str(path), *arguments],
            env=self.variables | variables, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
