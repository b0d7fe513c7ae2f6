"""The page of exit codes, read off the code that exits and the job script that reads them."""

from __future__ import annotations

import inspect
import re
import subprocess

from nlscale import errors
from nlscale.cluster.launch.script import read_script
from nlscale.cluster.life import exits
from nlscale.errors import SaidElsewhere, UserError

_CONDITION = re.compile(r"^if (\{ \[ \"\$code\".*?\}) &&", re.MULTILINE | re.DOTALL)
_KILLED = 137
_PAGE = """# Exit codes

The codes of `nlscale` itself, which Slurm sees; torchrun makes 1 of all of them. Of the ranks of a
run, one says in one line why it ended, and all end with the same code.

The job of [`nlscale launch slurm`](commands.md#launch-slurm) reads the code of its ranks: where it
requeues itself, the run goes on from its newest checkpoint. A run that restarts again and again
without a new one [gives up](keys.md#run.max_restarts).

| code | error | when | the Slurm job |
| --- | --- | --- | --- |
{rows}
"""


def page() -> str:
    """The page in Markdown."""
    phrases = _phrases()
    named = {c.exit_code: c for c in vars(errors).values() if _ends(c)}
    if missing := named.keys() - phrases.keys():
        raise ValueError(f"exit codes that nlscale.cluster.life.exits does not list: {missing}")
    rows = [_row(code, phrase, named.get(code)) for code, phrase in sorted(phrases.items())]
    rows.append(f"| 128 + n | | Killed by signal n; 137 is SIGKILL | {_in_slurm(_KILLED)} |")
    return _PAGE.format(rows="\n".join(rows))


def _row(code: int, phrase: str, error: type[UserError] | None) -> str:
    name = ""
    if error is not None:
        name = f"[`{error.__name__}`](../api/errors.md#nlscale.errors.{error.__name__})"
    return f"| {code} | {name} | {phrase[0].upper()}{phrase[1:]} | {_in_slurm(code)} |"


def _phrases() -> dict[int, str]:
    """`Exit codes: 0 done, 2 ..., 1 anything else.` of the module's docstring."""
    doc = " ".join((inspect.getdoc(exits) or "").partition("Exit codes: ")[2].split())
    found = re.findall(r"(\d+) (.+?)(?=, \d+ |\.$)", doc)
    if not found:
        raise ValueError("nlscale.cluster.life.exits lists no exit codes")
    return {int(code): phrase for code, phrase in found}


def _ends(thing: object) -> bool:
    return isinstance(thing, type) and issubclass(thing, UserError) and thing is not SaidElsewhere


def _in_slurm(code: int) -> str:
    """What the job script does, by its own condition."""
    found = _CONDITION.search(read_script("slurm/train.sbatch"))
    if found is None:
        raise ValueError("launch/slurm/train.sbatch no longer says when it requeues itself")
    ended = subprocess.run(["bash", "-c", f"code={code}; {found[1]}"])
    return "is requeued" if ended.returncode == 0 else "ends"
