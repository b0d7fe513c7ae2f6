"""What a person watching a sweep reads: a line a run that ends, and how far all of it is."""

from __future__ import annotations

from rich.console import Console
from rich.live import Live
from rich.text import Text

from nlscale.scaling.sweep.cost import Speeds, eta
from nlscale.scaling.sweep.runs import Run
from nlscale.scaling.sweep.status import Status, last_step
from nlscale.telemetry.terminal import duration, is_terminal, loss_text


class Board:
    """Progress of a sweep. A context manager: leaving it gives the terminal back.

    Args:
        runs: all of the sweep.
        states: where they stand, by name; kept up to date here.
        workers: runs at a time.
        out: where lines go.
    """

    def __init__(
        self, runs: list[Run], states: dict[str, Status], workers: int, out: Console
    ) -> None:
        self._runs, self._states, self._workers, self._out = runs, states, workers, out
        self._width = max(len(run.name) for run in runs)
        self._live: Live | None = None

    def __enter__(self) -> Board:
        if is_terminal() and not self._out.stderr:
            self._live = Live("", console=self._out, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def line(self, text: str, style: str = "") -> None:
        """Print a line."""
        self._out.print(Text(text, style), soft_wrap=True)

    def show(self, running: set[str]) -> None:
        """Show how far the sweep and these runs are, where there is a terminal."""
        if self._live is None:
            return
        parts = [self._progress(running)]
        for run in self._runs:
            if run.name in running:
                parts.append(f"{run.name} {last_step(run) / run.steps:.0%}")
        text = Text("  ".join(parts), no_wrap=True, overflow="ellipsis")
        self._live.update(text, refresh=True)

    def finished(self, run: Run, state: Status, seconds: float) -> None:
        """A run has finished, in so many seconds."""
        self._states[run.name] = state
        assert state.summary is not None
        loss = loss_text(state.summary["final_val_loss"])
        self.line(
            f"{run.name:<{self._width}}  validation loss {loss} in {duration(seconds)}  |  "
            f"{self._progress(set())}"
        )

    def failed(self, run: Run, reason: str) -> None:
        """A run has failed."""
        self.line(f"{run.name:<{self._width}}  failed: {reason}", "bold red")

    def _progress(self, running: set[str]) -> str:
        """`sweep 43 %, 12/18 runs, eta 4m10s`."""
        steps = {name: state.step for name, state in self._states.items()}
        steps |= {run.name: last_step(run) for run in self._runs if run.name in running}
        done = sum(run.flops_until(steps[run.name]) for run in self._runs)
        share = done / sum(run.flops for run in self._runs)
        left = eta(self._runs, steps, Speeds.measured(self._runs, self._states), self._workers)
        ended = sum(state.finished for state in self._states.values())
        shown = "-" if left is None else duration(left)
        return f"sweep {share:.0%} of FLOPs, {ended}/{len(self._runs)} runs, eta {shown}"
