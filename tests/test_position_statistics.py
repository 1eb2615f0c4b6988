"""Statistics over positions: against scikit-learn, scipy and planted truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from capt.errors import DataError
from capt.evaluation.position_statistics import (
    bootstrap,
    distance_trend,
    holm,
    mcnemar,
    position_gap,
    ring_means,
    sign_flip_test,
    spearman,
)


def test_a_gap_is_center_less_rest_by_unit():
    values = [[1, 1, 0, 0], [0.5, 0, 0.25, 0.25]]
    assert position_gap(values, [True, True, False, False]).tolist() == [1, 0]
    with pytest.raises(DataError, match="0 of 4 positions"):
        position_gap(values, [False] * 4)
    with pytest.raises(DataError, match="4 of 4 positions"):
        position_gap(values, [True] * 4)
    with pytest.raises(DataError, match=r"found shape \[3\], expected \[4\]"):
        position_gap(values, [True, False, False])


def test_rings_collect_positions_equally_far_out():
    found = ring_means([1, 2, 3, 4], [1, 0, 1, 2], [0.4, 0.0, 0.6, 1.0])
    assert [tuple(one.values()) for one in found] == [(0, 1, 2), (0.5, 2, 2), (1, 1, 4)]


def test_the_bootstrap_draws_units_not_pictures():
    random = np.random.default_rng(0)
    effect = random.normal(size=(30, 1))
    by_unit = bootstrap(np.repeat(effect, 100, 1).mean(1))
    pictures = bootstrap(np.repeat(effect, 100, 1).reshape(-1))
    assert by_unit.estimate == pytest.approx(pictures.estimate)
    assert (by_unit.high - by_unit.low) > 7 * (pictures.high - pictures.low)
    assert by_unit.high - by_unit.low == pytest.approx(2 * 1.96 * effect.std() / math.sqrt(30), rel=0.15)


def test_the_bootstrap_interval_covers_the_truth():
    hits = 0
    for seed in range(300):
        values = np.random.default_rng(seed).normal(0.3, 1, 25)
        found = bootstrap(values, draws=400, seed=seed)
        hits += found.low <= 0.3 <= found.high
    assert 0.88 <= hits / 300 <= 0.99


def test_a_ratio_of_means_is_bootstrapped_as_a_ratio():
    random = np.random.default_rng(1)
    below = random.uniform(1, 2, 40)
    found = bootstrap(np.stack([3 * below, below], 1), lambda means: means[0] / means[1])
    assert (found.low, found.estimate, found.high) == pytest.approx((3, 3, 3))


def test_the_sign_flip_test_is_the_exact_permutation_test():
    from scipy.stats import permutation_test

    for seed in range(20):
        values = np.random.default_rng(seed).normal(0.4, 1, 9)
        want = permutation_test((values, np.zeros(9)), lambda a, b, axis: (a - b).mean(axis), vectorized=True,
                                permutation_type="samples", n_resamples=np.inf).pvalue  # fmt: skip
        assert sign_flip_test(values) == pytest.approx(want)


def test_sign_flips_of_many_units_keep_their_level():
    p = [sign_flip_test(np.random.default_rng(seed).standard_t(3, 20)) for seed in range(300)]
    assert 0.02 <= np.mean(np.array(p) <= 0.05) <= 0.09
    assert sign_flip_test(np.ones(30)) < 1e-3
    assert sign_flip_test(np.zeros(30)) == 1
    assert sign_flip_test([1.0, 1, 1]) == 0.25  # too few to show anything


def test_holm_raises_the_smallest_most():
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])
    assert holm([0.6, 0.9]).tolist() == [1, 1]


def test_mcnemar_counts_discordant_items_and_is_the_binomial_test():
    from scipy.stats import binomtest

    first = [True] * 5 + [True] * 12 + [False] * 3 + [False] * 4
    second = [True] * 5 + [False] * 12 + [True] * 3 + [False] * 4
    found = mcnemar(first, second)
    assert (found["only_first"], found["only_second"]) == (12, 3)
    assert found["p"] == pytest.approx(binomtest(3, 15, 0.5).pvalue)
    assert mcnemar([True, False], [True, False])["p"] == 1
    with pytest.raises(DataError, match="expected"):
        mcnemar([True], [True, False])


def test_spearman_is_that_of_scipy_with_ties():
    from scipy.stats import spearmanr

    random = np.random.default_rng(0)
    for _ in range(50):
        x, y = random.integers(0, 6, 25), random.integers(0, 6, 25)
        assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert math.isnan(spearman([1, 2, 3], [1, 1, 1]))


def outcomes(seed: int, slope: float, area_slope: float):
    """Pictures in which far objects are small, so that area is confounded with distance."""
    random = np.random.default_rng(seed)
    objects = np.repeat(np.arange(40), 60)
    distance = random.uniform(0, 1, objects.size)
    area = np.exp(-1.5 * distance + random.normal(0, 0.5, objects.size))
    logit = random.normal(0, 1, 40)[objects] + slope * distance + area_slope * np.log(area) + 0.5
    return random.random(objects.size) < 1 / (1 + np.exp(-logit)), distance, objects, area


def test_the_trend_recovers_a_planted_slope_although_area_is_confounded():
    right, distance, objects, area = outcomes(0, -2.0, 1.0)
    found = distance_trend(right, distance, objects, area, draws=50)
    assert found.distance.low < -2 < found.distance.high and found.distance.estimate == pytest.approx(-2, abs=0.4)
    assert found.log_area == pytest.approx(1, abs=0.2)
    without = distance_trend(right, distance, objects, draws=0)
    assert without.distance.estimate < -3  # what area explains is blamed on distance


def test_without_a_trend_the_interval_holds_zero():
    right, distance, objects, area = outcomes(1, 0.0, 1.0)
    found = distance_trend(right, distance, objects, area, draws=100)
    assert found.distance.low < 0 < found.distance.high


def test_the_trend_is_scikit_learns_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    right, distance, objects, area = outcomes(2, -1.0, 0.5)
    penalty = 1e-2
    # scikit-learn penalises every coefficient alike; long dummy columns make the penalty of object effects vanish.
    dummies = 1e4 * np.eye(40)[objects]
    columns = np.column_stack([distance, np.log(area), dummies])
    model = LogisticRegression(C=1 / penalty, fit_intercept=False, tol=1e-10, max_iter=5000, solver="newton-cg")
    model.fit(columns, right)
    found = distance_trend(right, distance, objects, area, penalty=penalty, draws=0)
    assert found.distance.estimate == pytest.approx(model.coef_[0, 0], abs=2e-3)
    assert found.log_area == pytest.approx(model.coef_[0, 1], abs=2e-3)


def test_objects_without_mistakes_or_hits_say_nothing_about_the_trend():
    right, distance, objects, _ = outcomes(3, -1.0, 0.0)
    more = np.concatenate([right, np.ones(60, bool), np.zeros(60, bool)])
    apart = np.concatenate([distance, distance[:120]])
    which = np.concatenate([objects, np.repeat([40, 41], 60)])
    a, b = distance_trend(right, distance, objects, draws=0), distance_trend(more, apart, which, draws=0)
    assert a.distance.estimate == pytest.approx(b.distance.estimate) and a.objects == b.objects
    assert distance_trend(np.ones(8, bool), np.arange(8), np.zeros(8, int)) is None


def test_perfect_separation_stays_finite():
    distance = np.tile([0.0, 0.2, 0.8, 1.0], 10)
    found = distance_trend(distance < 0.5, distance, np.repeat(np.arange(10), 4), draws=20)
    assert math.isfinite(found.distance.estimate) and found.distance.estimate < -5
    assert math.isfinite(found.distance.low) and math.isfinite(found.distance.high)
