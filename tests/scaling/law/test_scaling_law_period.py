"""The law with the period of the levels: what a period costs, and that it is found."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scaling.coverage_of_intervals import about_ninety, few_starts
from scipy.optimize import differential_evolution

from nlscale.errors import UserError
from nlscale.scaling import Law, Points
from nlscale.scaling.law.analysis import analyse, multipliers
from nlscale.scaling.law.bootstrap import bootstrap
from nlscale.scaling.law.fit import fit
from nlscale.scaling.law.law import NAMES
from nlscale.scaling.law.newton import minimise
from nlscale.scaling.law.objective import DELTA, Problem

TRUTH = Law.of(1.69, 406.4, 410.7, 0.34, 0.28, 0.006)
PERIODS = (1.0, 4.0, 16.0)


def grid(noise: float, seed: int, law: Law = TRUTH, periods: tuple[float, ...] = PERIODS) -> Points:
    """Every size with every number of tokens and every period, with log-normal noise."""
    axes = (np.geomspace(5e7, 5e9, 5), np.geomspace(1e9, 1e11, 5), periods)
    n, d, period = np.array(list(itertools.product(*axes))).T
    rng = np.random.default_rng(seed)
    return Points.of(n, d, law.loss(n, d, period) * np.exp(noise * rng.normal(size=n.size)), period)


def sum_of_huber(law: Law, points: Points) -> float:
    """The objective, written anew from the law as it stands in the paper, with G log2(period)."""
    made = law.E + law.A / points.n**law.alpha + law.B / points.d**law.beta
    made = made + law.G * np.log2(points.period)
    size = np.abs(np.log(made) - np.log(points.loss))
    return float(np.where(size < 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)).sum())


@pytest.mark.parametrize("cost", [0.02, 0.0, -0.004])
def test_an_exact_law_is_recovered_whatever_the_sign_of_its_cost(cost: float) -> None:
    law = replace(TRUTH, G=np.asarray(cost))
    found = fit(grid(0, 0, law))
    for name in (*NAMES, "G"):
        wanted = float(getattr(law, name))
        assert float(getattr(found.law, name)) == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert found.converged and found.objective < 1e-20 and not found.doubts()


def test_the_objective_is_that_of_the_law_as_it_is_written() -> None:
    points = grid(0.01, 1)
    found = fit(points)
    assert found.objective == pytest.approx(sum_of_huber(found.law, points), rel=1e-9)


def test_derivatives_agree_with_finite_differences() -> None:
    points = grid(0.002, 1)
    problem = Problem.of(points.n, points.d, points.loss, points.period)
    rng = np.random.default_rng(2)
    spread = np.array([[1e-3], [1e-3], [0.01], [0.1], [0.3]])
    theta = fit(points).theta + rng.normal(size=(5, 6)) * spread
    # one where the period pays more than there is
    theta = np.concatenate([theta, theta[:1] - [[0, 0, 3, 0, 0, 0.6]]])
    weights = rng.integers(0, 3, (6, 75)).astype(float)
    _, gradient, hessian, _ = problem.derivatives(theta, weights)
    assert np.isfinite(hessian).all()
    assert gradient == pytest.approx(problem.gradient(theta, weights), rel=1e-12, abs=1e-18)
    for i in range(6):
        step = 1e-6 * np.eye(6)[i]
        slope = problem.value(theta + step, weights) - problem.value(theta - step, weights)
        assert slope / 2e-6 == pytest.approx(gradient[:, i], rel=1e-5, abs=1e-8)
        # No residual may cross delta within the step: there the Hessian jumps.
        shift = 1e-8 * np.eye(6)[i]
        sides = [np.abs(problem.residuals(theta + s)) < DELTA for s in (-shift, shift)]
        smooth = (sides[0] == sides[1]).all(axis=1)
        smooth[-1] = False
        assert smooth.sum() >= 3
        bend = problem.gradient(theta + shift, weights) - problem.gradient(theta - shift, weights)
        assert (bend / 2e-8)[smooth] == pytest.approx(hessian[smooth, i], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_never_worse_than_a_global_optimiser(seed: int) -> None:
    rng = np.random.default_rng(200 + seed)
    law = Law.of(
        rng.uniform(1, 3), *np.exp(rng.uniform(4, 7, 2)), *rng.uniform(0.2, 0.6, 2),
        rng.normal(scale=0.02),
    )  # fmt: skip
    count = int(rng.integers(12, 24))
    n, d = np.exp(rng.uniform(17, 22, count)), np.exp(rng.uniform(20, 25, count))
    period = rng.choice([1.0, 2.83, 8.0, 64.0], count)
    noise = rng.uniform(0.001, 0.03) * rng.standard_t(3, count)
    points = Points.of(n, d, law.loss(n, d, period) * np.exp(noise), period)
    problem, found = Problem.of(n, d, points.loss, period), fit(points)
    weights = np.ones(count)
    other = differential_evolution(
        lambda theta: problem.value(theta.T, weights),
        list(zip(problem.lower, problem.upper, strict=True)),
        popsize=12, maxiter=400, tol=1e-10, seed=seed, vectorized=True, updating="deferred",
    )  # fmt: skip
    assert found.objective <= float(other.fun) * (1 + 1e-9) + 1e-15


def test_a_resample_of_runs_of_period_1_alone_is_fitted_too() -> None:
    points = grid(0.003, 4)
    found = fit(points)
    counts = (points.period == 1).astype(float)[None]
    ends = minimise(found.problem, found.theta[None], counts)
    kept = points.period == 1
    plain = Points.of(points.n[kept], points.d[kept], points.loss[kept])
    assert ends.value[0] == pytest.approx(fit(plain).objective, rel=1e-6)


def test_the_truth_is_in_about_ninety_intervals_of_a_hundred() -> None:
    hits = dict.fromkeys((*NAMES, "G", "a", "loss", "cost"), 0)

    def quantities(law: Law) -> dict[str, np.ndarray]:
        named = {name: getattr(law, name) for name in (*NAMES, "G")}
        derived = {"a": law.exponents[0], "loss": law.optimum(1e22)[2], "cost": law.period_cost(64)}
        return named | derived

    truth = quantities(TRUTH)
    for seed in range(100):
        with few_starts():
            found = fit(grid(0.005, 3000 + seed))
        assert found.agreeing > 10
        drawn = bootstrap(found, 60, seed=seed)
        for name, values in quantities(drawn.laws).items():
            low, high = drawn.interval(values)
            hits[name] += bool(low <= truth[name] <= high)
    assert all(hit in about_ninety(len(hits)) for hit in hits.values()), hits


def test_what_each_period_costs_in_loss_and_in_compute() -> None:
    one = analyse(grid(0.001, 5), (), 60)
    assert one.period is not None and one.names[-1] == "G"
    assert [s.period for s in one.period.settings] == pytest.approx(PERIODS)
    assert [s.runs for s in one.period.settings] == [25, 25, 25]
    flops = float(one.points.flops.max())
    assert one.period.flops == flops
    for setting, period in zip(one.period.settings, PERIODS, strict=True):
        assert setting.loss == pytest.approx(0.006 * np.log2(period), abs=0.001)
        # at what share of the compute the true law at period 1 has lost as much
        loss = float(TRUTH.optimum(flops)[2]) + 0.006 * np.log2(period)
        share = float(TRUTH.compute_at(loss)) / flops
        assert setting.worth == pytest.approx(share, abs=0.01)
        assert setting.beyond is None and abs(setting.residual) < 0.001
        if period > 1:
            assert setting.loss_interval[0] < setting.loss < setting.loss_interval[1]
            assert setting.worth_interval[0] < setting.worth < setting.worth_interval[1] < 1
    assert not one.warnings and not one.ill_conditioned


def test_a_period_that_pays_is_worth_more_compute_than_was_measured() -> None:
    one = analyse(grid(0.0005, 5, replace(TRUTH, G=np.asarray(-0.004))), (), 40)
    assert one.period is not None
    slow = one.period.settings[-1]
    assert slow.loss < 0 and slow.worth > 1 and slow.beyond == pytest.approx(slow.worth)


def test_what_a_budget_buys_is_that_of_period_1() -> None:
    """Optima, isoFLOP and envelope are those of the same runs had they all had period 1."""
    flops = np.repeat(np.geomspace(1e18, 1e22, 5), 14)
    n = TRUTH.optimum(flops)[0] * np.tile(np.geomspace(1 / 3, 3, 14), 5)
    period = np.tile([1.0, 16.0], 35)
    noise = np.exp(0.001 * np.random.default_rng(0).normal(size=70))
    d = flops / 6 / n
    of_both = Points.of(n, d, TRUTH.loss(n, d, period) * noise, period)
    plain = Points.of(n, d, TRUTH.loss(n, d) * noise)
    with_period, without = analyse(of_both, (1e22,), 40), analyse(plain, (1e22,), 40)
    ours, theirs = with_period.optimal[0], without.optimal[0]
    assert ours.n == pytest.approx(theirs.n, rel=0.02)
    assert ours.loss == pytest.approx(theirs.loss, abs=0.002)
    for name in ("isoflop", "envelope"):
        found = getattr(with_period, name)
        assert found.a == pytest.approx(getattr(without, name).a, abs=0.02)


def test_families_are_compared_at_period_1() -> None:
    better = replace(TRUTH, A=0.8 * TRUTH.A, B=0.8 * TRUTH.B)
    old = grid(0.001, 1, periods=(1.0,)).without_idle_period()
    assert old.period is None
    fits = {"old": analyse(old, (), 40), "new": analyse(grid(0.001, 2, better), (), 40)}
    for m in multipliers(fits):
        assert m.value == pytest.approx(0.8 ** -(1 / 0.34 + 1 / 0.28), rel=0.1)


def test_a_law_without_the_period_is_not_that_of_runs_that_differ_in_it() -> None:
    """What --period is for: left out, the cost of the periods goes into the other terms."""
    points = grid(0.001, 6, replace(TRUTH, G=np.asarray(0.03)))
    ignored = analyse(replace(points, period=None), (), 40)
    heeded = analyse(points, (), 40)
    assert ignored.period is None
    truth = float(TRUTH.optimum(1e19)[2])
    least = [float(one.fit.law.optimum(1e19)[2]) for one in (ignored, heeded)]
    # a mean of 0, 2 and 4 doublings
    assert least[0] - truth == pytest.approx(0.06, abs=0.02)
    assert least[1] == pytest.approx(truth, abs=0.002)


def test_periods_that_grow_with_the_models_are_ill_conditioned() -> None:
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(5e7, 5e9, 6), np.geomspace(1e9, 1e11, 6)))
    period = 2.0 ** np.round(np.log2(n / 5e7))
    loss = TRUTH.loss(n, d, period) * np.exp(0.003 * np.random.default_rng(1).normal(size=36))
    one = analyse(Points.of(n, d, loss, period), (), 60)
    assert "N and D explain 99% of the variance of the periods" in (one.ill_conditioned or "")


def test_costs_from_a_law_that_was_not_measured_are_said_to_be() -> None:
    one = analyse(grid(0.001, 7, periods=(4.0, 16.0)), (), 40)
    assert any("no run has period 1, the shortest is 4" in line for line in one.warnings)


def test_too_little_to_tell_a_period_is_refused() -> None:
    points = grid(0.001, 8, periods=(4.0,))
    with pytest.raises(UserError, match=r"every run has the period 4; .* without --period"):
        analyse(points, (), 40)
    few = grid(0.001, 8)
    with pytest.raises(UserError, match="8 points are too few for a law of 6 parameters"):
        analyse(Points.of(few.n[:8], few.d[:8], few.loss[:8], few.period[:8]), (), 40)
