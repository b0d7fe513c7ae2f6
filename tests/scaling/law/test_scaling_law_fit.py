"""The fit itself: exact laws, the true optimum, derivatives, intervals that hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
from scaling.coverage_of_intervals import about_ninety, few_starts
from scipy.optimize import differential_evolution, minimize

from nlscale.scaling import Law, Points
from nlscale.scaling.law.analysis import analyse, multipliers
from nlscale.scaling.law.bootstrap import bootstrap
from nlscale.scaling.law.fit import fit, leave_out_largest
from nlscale.scaling.law.isoflop import envelope, isoflop
from nlscale.scaling.law.law import NAMES
from nlscale.scaling.law.newton import minimise
from nlscale.scaling.law.objective import DELTA, Problem

TRUTH = Law.of(1.69, 406.4, 410.7, 0.34, 0.28)


def grid(noise: float, seed: int, sizes: int = 7, budgets: int = 7, law: Law = TRUTH) -> Points:
    """Every size with every number of tokens, with log-normal noise."""
    n, d = np.meshgrid(np.geomspace(5e7, 5e9, sizes), np.geomspace(1e9, 1e11, budgets))
    n, d = n.ravel(), d.ravel()
    rng = np.random.default_rng(seed)
    return Points.of(n, d, law.loss(n, d) * np.exp(noise * rng.normal(size=n.size)))


def scattered(count: int, noise: float, seed: int) -> Points:
    """Random sizes and budgets, as a CSV of many people's runs has them."""
    rng = np.random.default_rng(seed)
    n = np.exp(rng.uniform(np.log(5e7), np.log(1e10), count))
    d = np.exp(rng.uniform(np.log(6e18), np.log(3e21), count)) / (6 * n)
    return Points.of(n, d, TRUTH.loss(n, d) * np.exp(noise * rng.normal(size=count)))


def sum_of_huber(theta: np.ndarray, points: Points) -> float:
    """The objective of the paper, written anew: uncentred, one fit, no shared code."""
    a, b, e, alpha, beta = theta
    terms = np.stack(
        [a - alpha * np.log(points.n), b - beta * np.log(points.d), np.full(points.n.size, e)]
    )
    size = np.abs(np.logaddexp.reduce(terms) - np.log(points.loss))
    return float(np.where(size < 1e-3, size**2 / 2, 1e-3 * (size - 5e-4)).sum())


@pytest.mark.parametrize("seed", range(4))
def test_an_exact_law_is_recovered(seed: int) -> None:
    rng = np.random.default_rng(seed)
    law = Law.of(rng.uniform(0.5, 3), *np.exp(rng.uniform(3, 7, 2)), *rng.uniform(0.2, 0.6, 2))
    found = fit(grid(0, 0, law=law))
    for name in NAMES:
        assert float(getattr(found.law, name)) == pytest.approx(float(getattr(law, name)), rel=1e-6)
    assert found.converged and found.objective < 1e-20 and not found.doubts()


def test_the_objective_is_the_sum_of_the_paper() -> None:
    points = scattered(60, 0.01, 5)
    found = fit(points)
    law = found.law
    theta = np.array([np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta])
    assert found.objective == pytest.approx(sum_of_huber(theta, points), rel=1e-9)


def test_derivatives_agree_with_finite_differences() -> None:
    points = scattered(40, 0.002, 1)
    problem = Problem.of(points.n, points.d, points.loss)
    rng = np.random.default_rng(2)
    near = fit(points).theta
    theta = near + rng.normal(size=(6, 5)) * np.array([[1e-3], [1e-3], [0.01], [0.1], [0.3], [0.5]])
    weights = rng.integers(0, 3, (6, 40)).astype(float)
    _, gradient, hessian, _ = problem.derivatives(theta, weights)
    assert gradient == pytest.approx(problem.gradient(theta, weights), rel=1e-12, abs=1e-18)
    for i in range(5):
        step = 1e-6 * np.eye(5)[i]
        slope = problem.value(theta + step, weights) - problem.value(theta - step, weights)
        assert slope / 2e-6 == pytest.approx(gradient[:, i], rel=1e-5, abs=1e-9)
        # No residual may cross delta within the step: there the Hessian jumps.
        shift = 1e-8 * np.eye(5)[i]
        sides = [np.abs(problem.residuals(theta + s)) < DELTA for s in (-shift, shift)]
        smooth = (sides[0] == sides[1]).all(axis=1)
        assert smooth.sum() >= 3
        bend = problem.gradient(theta + shift, weights) - problem.gradient(theta - shift, weights)
        assert (bend / 2e-8)[smooth] == pytest.approx(hessian[smooth, i], rel=1e-4, abs=1e-6)


def test_a_badly_placed_start_that_stops_early_is_not_the_optimum() -> None:
    """The known failure of approach 3: a mean for a sum, a loose tolerance, and one start."""
    points = scattered(245, 0.005, 3)
    found = fit(points)
    ended = minimize(
        lambda theta: sum_of_huber(theta, points) / 245,
        np.array([20.0, 5.0, -1.0, 1.5, 0.1]),
        method="L-BFGS-B",
    )
    assert ended.success  # it says so
    assert sum_of_huber(ended.x, points) > 1.5 * found.objective
    assert abs(ended.x[3] - 0.34) > 0.1 and abs(float(found.law.alpha) - 0.34) < 0.03
    assert found.converged and found.agreeing > 100 and found.gradient < 1e-7


def test_a_start_that_stopped_early_is_not_called_converged() -> None:
    points = scattered(245, 0.005, 3)
    problem = Problem.of(points.n, points.d, points.loss)
    start, weights = np.array([[0.5, -2.0, -1.0, 1.5, 0.1]]), np.ones((1, 245))
    assert not minimise(problem, start, weights, iterations=5).converged.any()
    assert minimise(problem, start, weights).converged.all()


@pytest.mark.parametrize("seed", range(6))
def test_never_worse_than_a_global_optimiser(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    law = Law.of(rng.uniform(1, 3), *np.exp(rng.uniform(4, 7, 2)), *rng.uniform(0.2, 0.6, 2))
    count = int(rng.integers(8, 20))
    n, d = np.exp(rng.uniform(17, 22, count)), np.exp(rng.uniform(20, 25, count))
    noise = rng.uniform(0.001, 0.05) * rng.standard_t(3, count)
    points = Points.of(n, d, law.loss(n, d) * np.exp(noise))
    problem, found = Problem.of(n, d, points.loss), fit(points)
    weights = np.ones(count)
    other = differential_evolution(
        lambda theta: problem.value(theta.T, weights),
        list(zip(problem.lower, problem.upper, strict=True)),
        popsize=12, maxiter=400, tol=1e-10, seed=seed, vectorized=True, updating="deferred",
    )  # fmt: skip
    assert found.objective <= float(other.fun) * (1 + 1e-9) + 1e-15


def test_the_optimum_of_a_budget_is_the_least_loss_on_it() -> None:
    n, d, loss = (float(v) for v in TRUTH.optimum(1e21))
    assert 6 * n * d == pytest.approx(1e21)
    sizes = n * np.geomspace(0.5, 2, 2001)
    losses = TRUTH.loss(sizes, 1e21 / 6 / sizes)
    assert losses.min() == pytest.approx(loss, rel=1e-9)
    assert sizes[losses.argmin()] == pytest.approx(n, rel=1e-3)
    assert float(TRUTH.compute_at(loss)) == pytest.approx(1e21, rel=1e-9)
    assert float(TRUTH.compute_at(1.69)) == np.inf


def test_a_weighted_fit_is_the_fit_of_repeated_points() -> None:
    """What the bootstrap rests on: a draw as counts is the draw."""
    points = grid(0.01, 4)
    counts = np.random.default_rng(0).multinomial(49, np.full(49, 1 / 49))
    again = np.repeat(np.arange(49), counts)
    repeated = fit(Points.of(points.n[again], points.d[again], points.loss[again]))
    found = fit(points)
    ends = minimise(found.problem, found.theta[None], counts[None].astype(float))
    assert ends.value[0] == pytest.approx(repeated.objective, rel=1e-9)


def test_resamples_reach_the_optimum_that_a_whole_fit_finds() -> None:
    """Warm starts save the grid of starts, and lose nothing by it."""
    points = scattered(40, 0.01, 9)
    found = fit(points)
    drawn = bootstrap(found, 8, seed=7)
    draws = np.random.default_rng(7).multinomial(40, np.full(40, 1 / 40), size=8)
    for index, counts in enumerate(draws):
        again = np.repeat(np.arange(40), counts)
        whole = fit(Points.of(points.n[again], points.d[again], points.loss[again]))
        theta = found.problem.theta(drawn.laws.take(index))[None]
        mine = found.problem.value(theta, counts[None].astype(float))[0]
        assert mine <= whole.objective * (1 + 1e-6)
    assert drawn.unconverged == 0


def test_intervals_are_reproducible_and_narrow_with_the_noise() -> None:
    found = fit(grid(0.01, 1))
    first, second = bootstrap(found, 60, seed=3), bootstrap(found, 60, seed=3)
    assert (first.laws.alpha == second.laws.alpha).all()
    less = bootstrap(fit(grid(0.001, 1)), 60, seed=3)
    low, high = first.interval(first.laws.alpha)
    narrow = less.interval(less.laws.alpha)
    assert narrow[1] - narrow[0] < 0.4 * (high - low)


def test_the_truth_is_in_about_ninety_intervals_of_a_hundred() -> None:
    sets, hits = 100, dict.fromkeys((*NAMES, "a", "N", "loss"), 0)

    def quantities(law: Law) -> dict[str, np.ndarray]:
        n, _, loss = law.optimum(1e22)
        named = {name: getattr(law, name) for name in NAMES}
        return {**named, "a": law.exponents[0], "N": n, "loss": loss}

    truth = quantities(TRUTH)
    for seed in range(sets):
        with few_starts():
            found = fit(grid(0.005, 1000 + seed))
        assert found.agreeing > 10
        drawn = bootstrap(found, 60, seed=seed)
        for name, values in quantities(drawn.laws).items():
            low, high = drawn.interval(values)
            hits[name] += bool(low <= truth[name] <= high)
    assert all(hit in about_ninety(len(hits)) for hit in hits.values()), hits


def test_leaving_out_outliers_brings_the_law_back() -> None:
    points = grid(0.001, 2)
    points.loss[[3, 30]] *= [1.3, 0.8]
    found = fit(points)
    laws = dict(leave_out_largest(found))
    assert list(laws) == [1, 2, 4, 8]
    assert set(np.argsort(-np.abs(found.residuals))[:2]) == {3, 30}
    keep = np.setdiff1d(np.arange(49), [3, 30])
    without = fit(Points.of(points.n[keep], points.d[keep], points.loss[keep]))
    assert float(laws[2].alpha) == pytest.approx(float(without.law.alpha), rel=1e-6)


def budgets_of(law: Law, count: int = 5) -> Points:
    """Seven sizes about the optimum of each of `count` budgets, without noise."""
    flops = np.repeat(np.geomspace(1e18, 1e22, count), 7)
    n = law.optimum(flops)[0] * np.tile(np.geomspace(1 / 3, 3, 7), count)
    return Points.of(n, flops / 6 / n, law.loss(n, flops / 6 / n))


def test_isoflop_and_envelope_find_the_exponents() -> None:
    points, a = budgets_of(TRUTH), float(TRUTH.exponents[0])
    for found in (isoflop(points), envelope(points)):
        assert found.reason is None and len(found.minima) == 5
        assert found.a == pytest.approx(a, abs=0.01) and found.b == pytest.approx(1 - a, abs=0.01)
        best = TRUTH.optimum([m.flops for m in found.minima])
        assert [m.n for m in found.minima] == pytest.approx(best[0], rel=0.1)


def test_isoflop_and_envelope_say_why_not() -> None:
    few = budgets_of(TRUTH, 2)
    assert "0 budgets have a minimum" in str(isoflop(scattered(12, 0, 1)).reason)
    assert isoflop(few).a is None and "2 budgets" in str(isoflop(few).reason)
    assert envelope(few).a is None and "2 runs are on the envelope" in str(envelope(few).reason)


def test_tokens_in_proportion_to_parameters_are_ill_conditioned() -> None:
    n = np.geomspace(1e8, 1e10, 20)
    noise = np.exp(0.003 * np.random.default_rng(0).normal(size=20))
    one = analyse(Points.of(n, 20 * n, TRUTH.loss(n, 20 * n) * noise), (1e20, 1e24), 40)
    assert one.ill_conditioned and "N and D do not vary" in one.ill_conditioned
    # The first budget is within the data, but the optimum that is fitted for it is not.
    inside, beyond = one.optimal
    assert "flops" not in inside.beyond and inside.beyond["N"] > 2 and inside.n is None
    assert beyond.refused == one.ill_conditioned and beyond.n is None
    assert beyond.beyond["flops"] == pytest.approx(1e24 / (120 * 1e20))


@pytest.mark.parametrize("seed", range(4))
def test_that_is_said_whichever_optimum_the_noise_leads_to(seed: int) -> None:
    """One with a vanishing term, or an exponent at its bound, is well-conditioned in itself."""
    n = np.geomspace(1e8, 1e10, 12)
    noise = np.exp(0.002 * np.random.default_rng(seed).normal(size=12))
    (doubt,) = [d for d in fit(Points.of(n, 20 * n, TRUTH.loss(n, 20 * n) * noise)).doubts()
                if "N explains" in d]  # fmt: skip
    assert doubt.startswith("N explains 100.0000% of the variance of D")
    apart = np.exp(0.2 * np.random.default_rng(seed).normal(size=12))  # of D over N: by a fifth
    points = Points.of(n, 20 * n * apart, TRUTH.loss(n, 20 * n * apart))
    assert not any("N explains" in doubt for doubt in fit(points).doubts())


def test_much_noise_is_ill_conditioned_by_its_intervals() -> None:
    one = analyse(scattered(14, 0.1, 0), (), 60)
    assert one.ill_conditioned and "interval" in one.ill_conditioned


def test_the_compute_multiplier_of_a_known_pair() -> None:
    """Terms smaller by s at equal E: compute smaller by s^(1/alpha + 1/beta) at equal loss."""
    better = Law.of(1.69, 0.8 * 406.4, 0.8 * 410.7, 0.34, 0.28)
    fits = {
        "old": analyse(grid(0.001, 1), (), 60),
        "new": analyse(grid(0.001, 2, law=better), (), 60),
    }
    ratios = multipliers(fits)
    expected = 0.8 ** -(1 / 0.34 + 1 / 0.28)
    assert len(ratios) == 5 and all(m.beyond is None for m in ratios)
    for m in ratios:
        assert (m.reference, m.family) == ("old", "new")
        assert m.value == pytest.approx(expected, rel=0.1)
        assert m.interval[0] < m.value < m.interval[1]


def test_flops_that_are_given_set_the_price_of_a_token() -> None:
    points = grid(0.002, 0)
    dear = Points(points.n, points.d, points.loss, 2 * points.flops, points.rows, "dear")
    one, two = analyse(points, (1e21,), 20), analyse(dear, (2e21,), 20)
    assert two.points.per_pair == pytest.approx(12)
    assert two.optimal[0].n == pytest.approx(one.optimal[0].n)
