"""What a sweep costs: hours on this machine, once measured, or GPU-hours on a named cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nlscale.cluster.machines import Cluster
from nlscale.errors import UserError
from nlscale.scaling.sweep.runs import Run
from nlscale.scaling.sweep.status import Status

_HOUR = 3600.0


@dataclass(frozen=True)
class Price:
    """GPU-hours of a cluster, at an assumed share of its peak."""

    cluster: Cluster
    utilisation: float

    def __post_init__(self) -> None:
        if self.cluster.gpu_tflops is None:
            raise UserError(
                f"{self.cluster.name}: gpu_tflops is not set, and compute cannot be priced without "
                f"it; give the dense bf16 peak of one GPU in TFLOP/s, such as gpu_tflops: 989"
            )
        if not 0 < self.utilisation <= 1:
            raise UserError(
                f"--utilisation {self.utilisation:g}: give a share above 0 and up to 1, such as 0.4"
            )

    def gpu_hours(self, flops: float) -> float:
        """Hours that one GPU would take."""
        assert self.cluster.gpu_tflops is not None
        return flops / (self.cluster.gpu_tflops * 1e12 * self.utilisation) / _HOUR


@dataclass(frozen=True)
class Speeds:
    """FLOP/s of one worker on this machine, measured by the runs that have finished."""

    by_chain: dict[str, float]
    overall: float | None
    """None until one has finished."""

    @classmethod
    def measured(cls, runs: list[Run], states: Mapping[str, Status]) -> Speeds:
        """From the tokens a second of the summaries."""
        flops: dict[str, float] = {}
        seconds: dict[str, float] = {}
        for run in runs:
            tokens_per_second = (states[run.name].summary or {}).get("tokens_per_second")
            if tokens_per_second:
                took = run.flops / (tokens_per_second * run.flops_per_token)
                flops[run.chain] = flops.get(run.chain, 0.0) + run.flops
                seconds[run.chain] = seconds.get(run.chain, 0.0) + took
        by_chain = {chain: flops[chain] / seconds[chain] for chain in flops}
        overall = sum(flops.values()) / sum(seconds.values()) if flops else None
        return cls(by_chain, overall)

    def seconds(self, run: Run, flops: float) -> float | None:
        """Seconds that `flops` of that run take; None where nothing has been measured.

        Of the runs that differ in length alone where one has finished, else as fast as all
        together.
        """
        speed = self.by_chain.get(run.chain, self.overall)
        return flops / speed if speed else None


def eta(runs: list[Run], steps: Mapping[str, int], speeds: Speeds, workers: int) -> float | None:
    """Seconds until all runs have finished; None where nothing has been measured.

    What is left, spread over the workers; or the longest chain, whose runs wait for each other.

    Args:
        runs: all of a sweep.
        steps: how far each has got, by name.
        speeds: of this machine.
        workers: runs at a time.
    """
    chains: dict[str, float] = {}
    for run in runs:
        seconds = speeds.seconds(run, run.flops - run.flops_until(steps[run.name]))
        if seconds is None:
            return None
        chains[run.chain] = chains.get(run.chain, 0.0) + seconds
    return max(sum(chains.values()) / workers, *chains.values())
