"""Does where an object is change how well it is recognised? Statistics for outcomes measured at several positions.

Outcomes of one object, or one pair of objects, hang together, so objects and pairs are the units of every interval and
test here, never single pictures. All definitions are ours unless a docstring names a source.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capt.errors import CaptError, DataError

FloatArray = NDArray[np.float64]

#: Up to so many units the sign-flip test tries all signs.
EXACT_UNITS = 12
_FLIPS = 20_000


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    estimate: float
    low: float
    high: float

    def record(self) -> dict[str, float | None]:
        """For JSON; what is undefined is None."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}

    def points(self) -> str:
        """A difference of shares in words, in points."""
        return f"{100 * self.estimate:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def _values(values: ArrayLike, name: str, ndim: int) -> FloatArray:
    array = np.asarray(values, np.float64)
    if array.ndim != ndim or not array.size:
        expected = "[n]" if ndim == 1 else "[n, positions]"
        raise DataError(f"{name}: found shape {list(array.shape)}, expected {expected} with at least one value")
    return array


def position_gap(values: ArrayLike, center: ArrayLike) -> FloatArray:
    """Mean over the center less mean over the rest, for each unit; float64 [n].

    Args:
        values: [n, positions], one row a unit.
        center: bool [positions]; some but not all are True.

    Raises:
        DataError: shapes that do not fit; no position in the center, or all of them.
    """
    array, inside = _values(values, "values", 2), np.asarray(center, bool)
    if inside.shape != array.shape[1:]:
        raise DataError(f"center: found shape {list(inside.shape)}, expected [{array.shape[1]}], one for each position")
    if inside.all() or not inside.any():
        raise DataError(
            f"center: {int(inside.sum())} of {inside.size} positions are in it, so there is nothing to compare; choose "
            "another radius, more cells or placement='border'"
        )
    gap: FloatArray = array[:, inside].mean(1) - array[:, ~inside].mean(1)
    return gap


def ring_means(values: ArrayLike, number: ArrayLike, distance: ArrayLike) -> list[dict[str, float]]:
    """Mean over the positions of each ring around the middle, nearest first.

    Args:
        values: [positions].
        number: int [positions], which ring each belongs to.
        distance: [positions], from the middle.

    Returns:
        ``{"distance", "positions", "mean"}`` of each ring, the distance being that of its positions on average.
    """
    array, apart = _values(values, "values", 1), _values(distance, "distance", 1)
    rings = np.asarray(number)
    return [
        {
            "distance": float(apart[rings == one].mean()),
            "positions": int((rings == one).sum()),
            "mean": float(array[rings == one].mean()),
        }
        for one in np.unique(rings)
    ]


def bootstrap(
    units: ArrayLike,
    statistic: Callable[[FloatArray], FloatArray] | None = None,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """A statistic of the means of units, with a percentile interval from drawing units with replacement.

    Args:
        units: [n], or [n, k] where the statistic needs k means (say, numerator and denominator of a ratio).
        statistic: means [k, draws] -> values [draws]; the only mean itself by default.
        draws: bootstrap samples.
        seed: of the draws.

    Source: Efron's percentile bootstrap, by cluster.
    """
    array = np.asarray(units, np.float64)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or not array.size:
        raise DataError(f"units: found shape {list(array.shape)}, expected [n] or [n, k] with at least one unit")
    combine = statistic or (lambda means: means[0])
    n = len(array)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    with np.errstate(divide="ignore", invalid="ignore"):
        exact, sampled = combine(array.mean(0)[:, None]), combine(array.T @ counts.T / n)
    kept = sampled[np.isfinite(sampled)]
    low, high = np.quantile(kept, [0.025, 0.975]) if kept.size else (math.nan, math.nan)
    return Interval(float(exact[0]), float(low), float(high))


def sign_flip_test(differences: ArrayLike, *, seed: int = 0) -> float:
    """p-value, two-sided, of the mean difference being 0 when each unit's difference is as likely to be its negative.

    All 2^n signs are tried for up to 12 units, else 20,000 drawn ones, the observed one among them, so the test is
    valid. With n units the p-value is at least 2^(1 - n): fewer than six cannot show anything at 5 %.

    Source: Fisher's randomisation test of paired differences.
    """
    values = _values(differences, "differences", 1)
    n = values.size
    if n <= EXACT_UNITS:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1).astype(np.float64)
    else:
        signs = 1 - 2 * np.random.default_rng(seed).integers(0, 2, (_FLIPS, n)).astype(np.float64)
        signs[0] = 1
    sums = abs(signs @ values)
    return float(np.mean(sums >= abs(values.sum()) * (1 - 1e-9) - 1e-12))


def check_level(level: float) -> None:
    """Refuse a level of a test that is no probability.

    Raises:
        CaptError: it is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise CaptError(f"level: found {level}, expected a probability such as 0.01")


def holm(p_values: ArrayLike) -> FloatArray:
    """p-values of several tests, raised so that comparing each with the level bounds the chance of any false one.

    Source: Holm's step-down procedure.
    """
    values = _values(p_values, "p_values", 1)
    order = np.argsort(values, kind="stable")
    raised = np.maximum.accumulate(values[order] * (values.size - np.arange(values.size)))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(raised, 1)
    return adjusted


def mcnemar(first: ArrayLike, second: ArrayLike) -> dict[str, float]:
    """Exact McNemar test on paired outcomes: ``only_first``, ``only_second`` (counts) and the two-sided ``p``.

    Args:
        first, second: bool [n], whether each item was right under either condition.

    Source: McNemar's test in its exact binomial form; without discordant pairs p is 1.
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    if a.ndim != 1 or a.shape != b.shape:
        raise DataError(f"mcnemar: found shapes {list(a.shape)} and {list(b.shape)}, expected [n] twice")
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1)) / 2**n
    return {"only_first": only_first, "only_second": only_second, "p": min(1.0, 2 * tail)}


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation, ties sharing their mean rank; NaN where either is constant."""
    ranks = [_ranks(_values(values, name, 1)) for values, name in ((x, "x"), (y, "y"))]
    if ranks[0].shape != ranks[1].shape:
        raise DataError(f"spearman: found {ranks[0].size} and {ranks[1].size} values, expected as many of both")
    a, b = (rank - rank.mean() for rank in ranks)
    scale = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / scale) if scale else math.nan


def _ranks(values: FloatArray) -> FloatArray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: FloatArray = (last - (counts - 1) / 2)[inverse]
    return ranks


@dataclass(frozen=True)
class Trend:
    """How the log-odds of being right change with distance.

    Attributes:
        distance: slope per unit of distance (0: middle, 1: corner), and its interval over objects.
        log_area: slope per unit of log area; None where all areas are equal.
        objects: objects that were sometimes right and sometimes wrong; only these say anything.
    """

    distance: Interval
    log_area: float | None
    objects: int

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"distance": self.distance.record(), "log_area": self.log_area, "objects": self.objects}


def distance_trend(
    right: ArrayLike,
    distance: ArrayLike,
    objects: ArrayLike,
    area: ArrayLike | None = None,
    *,
    penalty: float = 1e-2,
    draws: int = 200,
    seed: int = 0,
) -> Trend | None:
    """Logistic regression ``logit P(right) = b1 * distance + b2 * log(area) + effect of the object``.

    Args:
        right: bool [n], one outcome a picture.
        distance: [n], of the object from the middle.
        objects: int [n], which object it is; objects that are always right or always wrong are left out.
        area: [n], of the object; without it, or with equal areas, that term is left out.
        penalty: half of it times the sum of squared slopes is added, which keeps them finite under perfect separation.
        draws: bootstrap samples over objects.
        seed: of the draws.

    Returns:
        None where no object is both right and wrong.

    Source: logistic regression by Newton's method; intervals by a bootstrap over objects.
    """
    outcome, apart = _values(right, "right", 1), _values(distance, "distance", 1)
    group = np.asarray(objects)
    columns = [apart] if area is None else [apart, np.log(_values(area, "area", 1))]
    if any(column.shape != outcome.shape for column in (group, *columns)):
        raise DataError(f"distance_trend: {outcome.size} outcomes need as many distances, objects and areas")
    member = np.unique(group, return_inverse=True)[1]
    rate = np.bincount(member, outcome) / np.bincount(member)
    mixed = (rate > 0) & (rate < 1)
    if not mixed.any():
        return None
    keep = mixed[member]
    columns = [column for column in columns if np.ptp(column[keep])] or columns[:1]
    # Equal rows of one object are one row with a count, which makes the bootstrap cheap.
    rows, place = np.unique(np.stack([member, *columns], 1)[keep], axis=0, return_inverse=True)
    total = np.bincount(place.reshape(-1), minlength=len(rows)).astype(np.float64)
    hits = np.bincount(place.reshape(-1), outcome[keep], len(rows)).astype(np.float64)
    own = np.unique(rows[:, 0], return_inverse=True)[1]
    slopes = _logistic(rows[:, 1:], own, hits, total, penalty)
    n = int(mixed.sum())
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)[:, own]
    sampled = [_logistic(rows[:, 1:], own, hits * w, total * w, penalty)[0] for w in weights]
    low, high = np.quantile(sampled, [0.025, 0.975]) if draws else (math.nan, math.nan)
    return Trend(Interval(float(slopes[0]), float(low), float(high)), float(slopes[1]) if len(slopes) > 1 else None, n)


def _logistic(
    x: FloatArray, group: NDArray[np.int64], hits: FloatArray, total: FloatArray, penalty: float
) -> FloatArray:
    """Slopes [k] of a penalised binomial regression with an intercept for each group.

    Rows: x [n, k], group [n] (0, 1, ...), hits and total [n]. Newton steps; the intercepts, whose part of the Hessian
    is diagonal, are eliminated by a Schur complement, so a step costs O(n k^2).
    """
    n_groups = int(group.max()) + 1
    slopes, effects = np.zeros(x.shape[1]), np.zeros(n_groups)
    # A whisper of a prior on the intercepts as well: groups of no weight keep theirs.
    prior = 1e-9

    def objective(slopes: FloatArray, effects: FloatArray) -> float:
        logit = x @ slopes + effects[group]
        fit = hits @ logit - total @ np.logaddexp(0, logit)
        return float(fit - penalty / 2 * slopes @ slopes - prior / 2 * effects @ effects)

    value = objective(slopes, effects)
    for _ in range(100):
        chance = 0.5 * (1 + np.tanh((x @ slopes + effects[group]) / 2))
        rest, weight = hits - total * chance, total * chance * (1 - chance)
        g_slopes = x.T @ rest - penalty * slopes
        g_effects = np.bincount(group, rest, n_groups) - prior * effects
        cross = np.stack([np.bincount(group, weight * column, n_groups) for column in x.T], 1)
        own = np.bincount(group, weight, n_groups) + prior
        schur = (x.T * weight) @ x + penalty * np.eye(x.shape[1]) - cross.T @ (cross / own[:, None])
        step = np.linalg.solve(schur, g_slopes - cross.T @ (g_effects / own))
        step_effects = (g_effects - cross @ step) / own
        length = 1.0
        while (new := objective(slopes + length * step, effects + length * step_effects)) < value and length > 1e-6:
            length /= 2
        slopes, effects = slopes + length * step, effects + length * step_effects
        if abs(new - value) <= 1e-10 * (abs(value) + 1e-10):
            break
        value = new
    return slopes
