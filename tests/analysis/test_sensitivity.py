from __future__ import annotations

import math

import numpy as np
import optuna
import pytest
from scipy.stats import binomtest

from analysis.failure_rates import failure_rate
from analysis.importance import MOST_TRIALS, Method, importance
from analysis.power import seeds_to_equivalence, seeds_to_resolve, workloads_to_resolve
from analysis.sensitivity import learning_rate_width, tunability
from tunebench.study.power import paired_power

INF = math.inf


def test_width_of_the_good_learning_rates_by_hand() -> None:
    width = learning_rate_width(np.array([1e-4, 1e-3, 1e-2, 1e-1]), np.array([3.0, 1.05, 1.0, INF]))
    assert width is not None
    assert (width.low, width.high, width.trials) == (1e-3, 1e-2, 2)
    assert width.decades == pytest.approx(1.0)
    assert (width.reaches_low, width.reaches_high) == (False, False)


def test_width_that_ends_at_the_edge_says_so() -> None:
    width = learning_rate_width(np.array([1e-3, 1e-2]), np.array([1.0, 2.0]))
    assert width is not None
    assert (width.decades, width.reaches_low, width.reaches_high) == (0.0, True, False)
    assert learning_rate_width(np.array([1e-3]), np.array([INF])) is None


def test_tunability_by_hand() -> None:
    found = tunability(np.array([1.0, 2.0, 4.0, INF]), np.array([10.0, 10.0, 20.0, 0.0]), default_error=2.0)
    assert found is not None
    # The failure counts as 4: median 3.
    assert (found.median_error, found.best_error) == (3.0, 1.0)
    assert found.gain == pytest.approx(2.0 / 3.0)
    assert found.default_gain == pytest.approx(0.5)
    # Best of three: mean over subsets 1, 1, 1, 2 = 1.25; of four: 1.
    assert found.trials_to_level == {0.5: 3, 0.2: 4, 0.1: 4, 0.05: 4}
    assert found.seconds_to_level[0.5] == pytest.approx(30.0)
    assert tunability(np.array([INF]), np.array([1.0])) is None


@pytest.mark.parametrize(("failed", "ended"), [(0, 8), (0, 16), (3, 10), (10, 10)])
def test_failure_rates_are_scipys_exact_binomial(failed: int, ended: int) -> None:
    found, expected = failure_rate(failed, ended), binomtest(failed, ended).proportion_ci(method="exact")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    if failed == 0:
        assert found.high == pytest.approx(1.0 - 0.025 ** (1.0 / ended))


def test_no_trial_has_no_rate_and_nonsense_is_refused() -> None:
    assert failure_rate(0, 0).share is None
    with pytest.raises(ValueError, match="found 3 of 2"):
        failure_rate(3, 2)


def test_power_is_that_of_the_paired_t_test() -> None:
    generator = np.random.default_rng(1)
    sample = generator.normal(1.0, 1.0, size=(40_000, 5))
    t = sample.mean(axis=1) / (sample.std(axis=1, ddof=1) / math.sqrt(5.0))
    assert paired_power(1.0, 1.0, 5) == pytest.approx((t > 2.776445).mean(), abs=0.01)


def test_seeds_that_resolve_a_difference() -> None:
    seeds = seeds_to_resolve(0.5, 1.0)
    assert seeds == 34
    assert paired_power(0.5, 1.0, 34) >= 0.8 > paired_power(0.5, 1.0, 33)
    assert seeds_to_resolve(0.0, 1.0) is None
    assert seeds_to_resolve(0.001, 1.0) is None
    assert seeds_to_resolve(1.0, 0.0) == 2


def test_seeds_that_show_a_tie() -> None:
    assert seeds_to_equivalence(2.0, 1.0, 1.0) is None
    found = seeds_to_equivalence(0.0, 1.0, 1.0)
    assert found is not None
    assert 8 <= found <= 12


def test_workloads_are_never_fewer_than_the_test_needs() -> None:
    assert workloads_to_resolve(-5.0, 0.1, 6) == 6
    assert workloads_to_resolve(0.1, 0.3, 6) == pytest.approx(76, abs=6)
    assert workloads_to_resolve(0.0, 0.3, 6) is None


def test_the_hyperparameter_that_decides_comes_first() -> None:
    generator = np.random.default_rng(3)
    ranges = {
        "learning_rate": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True),
        "beta1": optuna.distributions.FloatDistribution(0.0, 1.0),
        "view": optuna.distributions.CategoricalDistribution(["flat", "merged"]),
    }
    rates, betas = 10.0 ** generator.uniform(-4, -1, 60), generator.uniform(size=60)
    params = [
        {"learning_rate": float(rate), "beta1": float(beta), "view": ["flat", "merged"][place % 2]}
        for place, (rate, beta) in enumerate(zip(rates, betas, strict=True))
    ]
    errors = (np.log10(rates) + 2.5) ** 2
    errors[:3] = INF
    for method in Method:
        found = importance(params, errors, ranges, method, seed=1)
        assert found is not None
        assert next(iter(found)) == "learning_rate"
        assert sum(found.values()) == pytest.approx(1.0)
    assert importance(params[:5], errors[:5], ranges, Method.PED_ANOVA, seed=1) is None
    assert importance(params, np.ones(60), ranges, Method.PED_ANOVA, seed=1) is None


def test_importance_of_many_trials_looks_at_a_sample_and_finds_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(4)
    ranges = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in ("first", "second")}
    params = [{name: float(generator.random()) for name in ranges} for _ in range(3 * max(MOST_TRIALS.values()))]
    errors = np.array([1.0 + (p["first"] - 0.5) ** 2 + 0.01 * p["second"] for p in params], dtype=np.float64)
    for method in Method:
        found = importance(params, errors, ranges, method, seed=1)
        assert found is not None
        assert found["first"] > 0.8
        assert found == importance(params, errors, ranges, method, seed=1)
    assert capfd.readouterr().err == ""
