"""The report: a table for a person, the same as JSON, and progress until it is there."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import nlscale
from nlscale.cluster.doctor.findings import Finding, Grade, plural, worst

EXIT_ERRORS = 2
_FILE_WIDTH = 100  # columns, where there is no terminal to ask
_STYLES = {
    Grade.ok: "green",
    Grade.note: "cyan",
    Grade.warning: "bold yellow",
    Grade.error: "bold red",
}


@dataclass
class Report:
    """What was found."""

    hosts: list[str]
    ranks: int
    """That took part; 1 where it was one machine alone."""
    findings: list[Finding] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    """What the findings were judged from, by check and host."""
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """0, or 2 if one of the findings is an error."""
        return EXIT_ERRORS if worst(self.findings) == Grade.error else 0

    def plain(self) -> dict[str, Any]:
        """As `--json` prints it.

        `nlscale` (version), `hosts`, `ranks`, `seconds`, `worst` (a grade), `findings`: each
        `check`, `grade`, `measured`, `advice` (may be empty) and `hosts` (empty: all together),
        and `measured`: the numbers behind them.
        """
        return {
            "nlscale": nlscale.__version__,
            "hosts": self.hosts,
            "ranks": self.ranks,
            "seconds": round(self.seconds, 1),
            "worst": worst(self.findings).value,
            "findings": [
                {
                    "check": finding.check,
                    "grade": finding.grade.value,
                    "measured": finding.measured,
                    "advice": finding.advice,
                    "hosts": list(finding.hosts),
                }
                for finding in self.findings
            ],
            "measured": self.measured,
        }


def print_report(report: Report) -> None:
    """Print a line for each check, with the advice below what needs one."""
    console = Console(
        markup=False, highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH
    )
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in report.findings:
        where = f"{', '.join(finding.hosts)}: " if finding.hosts and len(report.hosts) > 1 else ""
        text = Text(f"{where}{finding.measured}")
        table.add_row(Text(finding.grade.value, _STYLES[finding.grade]), finding.check, text)
        if finding.advice:
            table.add_row("", "", f"-> {finding.advice}")
    console.print(table)
    console.print()
    console.print(_verdict(report), soft_wrap=True)


def _verdict(report: Report) -> str:
    counts = Counter(finding.grade for finding in report.findings)
    bad = (Grade.error, Grade.warning)
    found = [plural(counts[grade], grade.value) for grade in bad if counts[grade]]
    where = report.hosts[0]
    if report.ranks > 1:
        where = f"{plural(report.ranks, 'rank')} on {plural(len(report.hosts), 'node')}"
    return f"{where}: {', '.join(found) or 'nothing to mend'}; {report.seconds:.0f} s"


@contextmanager
def progress(enabled: bool) -> Iterator[Callable[[str], None]]:
    """Shows on standard error what is being measured: in place in a terminal, else a line each."""
    if not enabled:
        yield lambda text: None
    elif sys.stderr.isatty():
        console = Console(stderr=True, markup=False, highlight=False)
        with console.status("looking around") as status:
            yield lambda text: status.update(text)
    else:
        yield lambda text: print(f"nlscale doctor: {text}", file=sys.stderr, flush=True)
