"""What was found in each layout of a position grid, and the numbers made of it.

*Visibility*: is a lone object recognised less well away from the middle? *Competition*: is an object at the side
dropped because another is in the middle? *Capacity*: which of many objects leave a trace? They are different questions
and are never mixed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capt.data.position_grid import Cells
from capt.errors import CaptError
from capt.evaluation.position_statistics import (
    Interval,
    bootstrap,
    distance_trend,
    mcnemar,
    position_gap,
    ring_means,
    spearman,
)

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

#: What a caption of the four-way test can keep: both objects, one of them, or none.
CHOICES = ("both", "peripheral only", "central only", "neither")
BOTH, PERIPHERAL, CENTRAL, NEITHER = range(4)
#: Lift in the middle below which the retention of an object is not defined.
MIN_LIFT = 0.01


@dataclass(frozen=True, eq=False)
class Positions:
    """Where the outcomes were measured.

    Attributes:
        xy: float64 [P, 2], centres of the objects in [-1, 1].
        radius: float64 [P], distance from the middle, 1 in the corner.
        ring: float64 [P], larger of |x| and |y|.
        ring_number: int64 [P], which ring of cells, 0 for the middle.
        center: bool [P], the ring is at most the center radius.
        middle: number of the middle position.
    """

    xy: FloatArray
    radius: FloatArray
    ring: FloatArray
    ring_number: IntArray
    center: NDArray[np.bool_]
    middle: int

    @classmethod
    def of(cls, cells: Cells, center_radius: float) -> Positions:
        """The positions of a grid; the center are those whose ring is at most ``center_radius``.

        Raises:
            CaptError: none of them, or all.
        """
        ring = cells.ring
        center = ring <= center_radius + 1e-9
        if center.all() or not center.any():
            raise CaptError(
                f"center_radius: {center_radius} puts {int(center.sum())} of {len(ring)} positions into the center; "
                f"they lie at {sorted(set(ring.round(3).tolist()))}. Choose one between two of these, or more cells."
            )
        return cls(cells.xy, cells.radius, ring, cells.ring_number, center, int(np.argmin(cells.radius)))

    @cached_property
    def others(self) -> IntArray:
        """All positions but the middle."""
        return np.delete(np.arange(len(self.ring)), self.middle)

    @cached_property
    def cells(self) -> int:
        """Cells along each side."""
        return math.isqrt(len(self.ring))

    def as_map(self, values: ArrayLike) -> list[list[float | None]]:
        """Values of all positions, or of :attr:`others`, as rows of the grid; None where there is no value."""
        array = np.full(len(self.ring), math.nan)
        given = np.asarray(values, np.float64)
        array[self.others if given.size < array.size else slice(None)] = given
        rows = array.reshape(self.cells, self.cells).tolist()
        return [[value if math.isfinite(value) else None for value in row] for row in rows]

    def rings(self, values: ArrayLike) -> list[dict[str, float]]:
        """Means by ring of values at all positions, or at :attr:`others`."""
        which = self.others if np.size(values) < len(self.ring) else slice(None)
        return ring_means(values, self.ring_number[which], self.ring[which])

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {"xy": self.xy.tolist(), "radius": self.radius.tolist(), "center": self.center.tolist()}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True, eq=False)
class Visibility:
    """Lone objects, each named among all of them.

    K objects, V variants (grounds times replicates), P positions.

    Attributes:
        names: of the objects, [K].
        positions: where they were.
        predicted: int64 [K, V, P], which object was named; the first of equally good ones.
        margin: float64 [K, V, P], cosine of the true name less the best other one.
        lift: float64 [K, V, P], cosine of the true name less that of the same ground without the object.
        influence: float64 [K, V, P], Euclidean distance of the unit embeddings with and without the object.
    """

    names: Sequence[str]
    positions: Positions
    predicted: IntArray
    margin: FloatArray
    lift: FloatArray
    influence: FloatArray

    @cached_property
    def right(self) -> NDArray[np.bool_]:
        """bool [K, V, P]."""
        return np.asarray(self.predicted == np.arange(len(self.names))[:, None, None])

    @cached_property
    def profile(self) -> FloatArray:
        """Accuracy at each position, float64 [P]."""
        return np.asarray(self.right.mean((0, 1)))

    def gaps(self) -> FloatArray:
        """Accuracy in the center less that outside, for each object, float64 [K]."""
        return position_gap(self.right.mean(1), self.positions.center)

    def lift_gaps(self) -> FloatArray:
        """The same of the lift, float64 [K]."""
        return position_gap(self.lift.mean(1), self.positions.center)

    def retention(self) -> FloatArray:
        """Lift at each position over lift in the middle, mean over objects with a lift there, float64 [P]."""
        by_object = self.lift.mean(1)
        middle = by_object[:, self.positions.middle]
        kept = middle > MIN_LIFT
        if not kept.any():
            return np.full(by_object.shape[1], math.nan)
        return np.asarray((by_object[kept] / middle[kept, None]).mean(0))

    def center_index(self) -> Interval:
        """Mean lift over the center divided by mean lift over all positions; 1 means no bias."""
        by_object = self.lift.mean(1)
        both = np.stack([by_object[:, self.positions.center].mean(1), by_object.mean(1)], 1)
        return bootstrap(both, lambda means: means[0] / means[1])

    def gated(self) -> dict[str, Any]:
        """Only pictures of objects that were recognised in the middle.

        The middle itself is right by this choice, so the gap leaves it out.
        """
        middle, center = self.positions.middle, self.positions.center
        recognised = self.right[:, :, middle]
        kept = self.right[recognised]
        if not len(kept):
            return {"items": 0, "share": 0.0, "map": None, "gap_without_middle": None}
        inner = center.copy()
        inner[middle] = False
        profile = kept.mean(0)
        gap = profile[inner].mean() - profile[~center].mean() if inner.any() else math.nan
        return {
            "items": int(recognised.sum()),
            "share": float(recognised.mean()),
            "map": self.positions.as_map(profile),
            "gap_without_middle": _finite(gap),
        }

    def middle_against_side(self) -> dict[str, float]:
        """McNemar's test over objects, first variant; each middle picture is paired with one outside, in turn."""
        right = self.right[:, 0]
        outside = np.flatnonzero(~self.positions.center)
        side = right[np.arange(len(right)), outside[np.arange(len(right)) % len(outside)]]
        return mcnemar(right[:, self.positions.middle], side)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        k, v, p = self.right.shape
        lift, influence = self.lift.mean((0, 1)), self.influence.mean((0, 1))
        trend = distance_trend(
            self.right.reshape(-1), np.tile(self.positions.radius, k * v), np.repeat(np.arange(k), v * p)
        )
        gap = bootstrap(self.gaps())
        center = self.profile[self.positions.center].mean()
        return {
            "objects": k,
            "images": self.right.size,
            "chance": 1 / k,
            "accuracy": float(self.profile.mean()),
            "accuracy_center": float(center),
            "accuracy_off": float(self.profile[~self.positions.center].mean()),
            "gap": gap.record(),
            "relative_gap": _finite(gap.estimate / center) if center else None,
            "accuracy_map": self.positions.as_map(self.profile),
            "accuracy_rings": self.positions.rings(self.profile),
            "lift_map": self.positions.as_map(lift),
            "lift_rings": self.positions.rings(lift),
            "lift_gap": bootstrap(self.lift_gaps()).record(),
            "center_index": self.center_index().record(),
            "retention_map": self.positions.as_map(self.retention()),
            "influence_map": self.positions.as_map(influence),
            "influence_rings": self.positions.rings(influence),
            "trend": trend.record() if trend else None,
            "spearman": _finite(spearman(self.positions.radius, self.profile)),
            "mcnemar": self.middle_against_side(),
            "gated": self.gated(),
            "median_margin": float(np.median(abs(self.margin))),
            "accuracy_by_object": dict(zip(self.names, self.right.mean((1, 2)).tolist(), strict=True)),
        }


@dataclass(frozen=True, eq=False)
class Competition:
    """One object in the middle and another at the side, named among four captions.

    N pairs of different objects, each in both roles; V variants; both orders of the two names in the caption;
    P - 1 positions of the object at the side.

    Attributes:
        pairs: names of the two objects of each pair, [N].
        positions: where the second object was; only ``positions.others`` occur.
        choice: int64 [N, 2, V, 2, P - 1], what the chosen caption keeps (a position in ``CHOICES``).
        control: the same with objects of half the size, the second in a corner, int64 [N, 2, V, 2, 4].
        center: int64 [N, 2, V, 2], both objects side by side in the middle, at half the size.
        preference: float64 [N, 2, V, P - 1], cosine of the central object's name less the peripheral one's.
    """

    pairs: Sequence[tuple[str, str]]
    positions: Positions
    choice: IntArray
    control: IntArray
    center: IntArray
    preference: FloatArray

    @cached_property
    def profile(self) -> FloatArray:
        """Share of pictures in which both are found, by position of the object at the side, float64 [P - 1]."""
        return np.asarray((self.choice == BOTH).mean((0, 1, 2, 3)))

    def shares(self, choice: IntArray) -> dict[str, float]:
        """Share of each choice."""
        return {name: float((choice == kind).mean()) for kind, name in enumerate(CHOICES)}

    def gaps(self, *, matched: bool = True) -> FloatArray:
        """Both found side by side in the middle less both found apart, for each pair, float64 [N].

        Args:
            matched: apart at the same size, in the corners; False compares with objects of full size at all positions.
        """
        apart = self.control if matched else self.choice
        gap: FloatArray = (self.center == BOTH).mean((1, 2, 3)) - (apart == BOTH).mean((1, 2, 3, 4))
        return gap

    def kept(self) -> FloatArray:
        """Share in which only the central object is kept less share in which only the other is, by pair, float64 [N].

        Each object of a pair has been in the middle as often as at the side, at equal size, so what makes one of them
        easier cancels.
        """
        kept: FloatArray = (self.choice == CENTRAL).mean((1, 2, 3, 4)) - (self.choice == PERIPHERAL).mean((1, 2, 3, 4))
        return kept

    def record(self) -> dict[str, Any]:
        """For JSON."""
        axes = (0, 1, 2, 3)
        maps = {name: self.positions.as_map((self.choice == kind).mean(axes)) for kind, name in enumerate(CHOICES)}
        return {
            "pairs": [list(pair) for pair in self.pairs],
            "images": self.preference.size + (self.center.size + self.control.size) // 2,
            "chance": 1 / len(CHOICES),
            "accuracy_off": float(self.profile.mean()),
            "accuracy_off_half_size": float((self.control == BOTH).mean()),
            "accuracy_center": float((self.center == BOTH).mean()),
            "gap": bootstrap(self.gaps(matched=False)).record(),
            "gap_half_size": bootstrap(self.gaps()).record(),
            "choices": {
                "off": self.shares(self.choice),
                "off_half_size": self.shares(self.control),
                "center": self.shares(self.center),
            },
            "choice_maps": maps,
            "accuracy_rings": self.positions.rings(self.profile),
            "spearman": _finite(spearman(self.positions.radius[self.positions.others], self.profile)),
            "kept_central_less_peripheral": bootstrap(self.kept()).record(),
            "preference": bootstrap(self.preference.mean((1, 2, 3))).record(),
            "preference_map": self.positions.as_map(self.preference.mean((0, 1, 2))),
            "first_name_first": self.shares(self.choice[:, :, :, 0]),
            "first_name_last": self.shares(self.choice[:, :, :, 1]),
        }


@dataclass(frozen=True, eq=False)
class Capacity:
    """A different object in every cell.

    Attributes:
        names: of the objects, [P].
        positions: the cells.
        auc: float64 [P objects, V, P positions], share of absent names that score below the object's own, ties half.
    """

    names: Sequence[str]
    positions: Positions
    auc: FloatArray

    @cached_property
    def profile(self) -> FloatArray:
        """Mean at each position over all objects, each of which was there equally often, float64 [P]."""
        return np.asarray(self.auc.mean((0, 1)))

    def gaps(self) -> FloatArray:
        """Center less outside, for each object, float64 [P]."""
        return position_gap(self.auc.mean(1), self.positions.center)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "objects": list(self.names),
            "images": int(self.auc.size // len(self.names)),
            "chance": 0.5,
            "auc": float(self.profile.mean()),
            "auc_map": self.positions.as_map(self.profile),
            "auc_rings": self.positions.rings(self.profile),
            "gap": bootstrap(self.gaps()).record(),
        }
