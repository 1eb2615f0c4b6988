"""Seen against unseen accuracy as a bias for the unseen pairs moves from one end to the other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt.errors import CaptError, NumericError

Array = NDArray[Any]

#: Of the published procedure: steps of the grid, what is taken off each bias, and the bias that stands for infinity.
GRID_STEPS, GRID_OFFSET, GRID_LAST_BIAS = 20, 1e-4, 1000.0


@dataclass(frozen=True, eq=False)
class SeenUnseenCurve:
    """How many images are right at each bias, as integers; accuracies are their exact ratios.

    An image is predicted as a seen pair exactly if ``margin > bias``, where its margin is its best seen minus its best
    unseen score: a tie goes to the unseen pair. Accuracies of no images are 0.

    Attributes:
        biases: float64 [P], ascending; -inf is the limit "seen wherever there is a seen candidate".
        seen_right: int64 [P], images of seen pairs that are right.
        unseen_right: int64 [P], images of unseen pairs that are right.
        n_seen, n_unseen: images of either kind.
    """

    biases: NDArray[np.float64]
    seen_right: NDArray[np.int64]
    unseen_right: NDArray[np.int64]
    n_seen: int
    n_unseen: int

    @classmethod
    def exact(cls, margin: Any, right: Any, seen: Any) -> SeenUnseenCurve:
        """The curve at every bias where it changes, from all seen to all unseen.

        Args:
            margin: float [N], best seen minus best unseen score (inf: no unseen candidate, -inf: no seen candidate).
            right: bool [N], whether the label is the best pair of its own kind.
            seen: bool [N], whether the label is a seen pair.

        Source: reduced form of the published sweep, which tries 20 to 40 of these biases (:meth:`grid`).
        """
        margin, right, seen = _images(margin, right, seen)
        changes = np.unique(margin[right & np.isfinite(margin)])
        return cls._at(np.concatenate([[-np.inf], changes]), margin, right, seen)

    @classmethod
    def grid(cls, margin: Any, right: Any, seen: Any) -> SeenUnseenCurve:
        """The points of the published evaluation, for comparison with printed numbers; arguments as :meth:`exact`.

        Of the c images of unseen pairs that are right under bias 1000, every max(c // 20, 1)-th margin in ascending
        order, less 1e-4, is a bias; 1000 is the last. Its curve misses the exact one between those biases.
        """
        margin, right, seen = _images(margin, right, seen)
        won = np.sort(margin[right & ~seen & (margin <= GRID_LAST_BIAS)])
        biases = won[:: max(len(won) // GRID_STEPS, 1)] - GRID_OFFSET
        return cls._at(np.append(biases, GRID_LAST_BIAS), margin, right, seen)

    @classmethod
    def _at(cls, biases: Array, margin: Array, right: Array, seen: Array) -> SeenUnseenCurve:
        lost, won = np.sort(margin[right & seen]), np.sort(margin[right & ~seen])
        return cls(
            biases=biases,
            seen_right=(len(lost) - np.searchsorted(lost, biases, "right")).astype(np.int64),
            unseen_right=np.searchsorted(won, biases, "right").astype(np.int64),
            n_seen=int(seen.sum()),
            n_unseen=int((~seen).sum()),
        )

    @property
    def seen_accuracy(self) -> NDArray[np.float64]:
        """float64 [P]."""
        return self.seen_right / max(self.n_seen, 1)

    @property
    def unseen_accuracy(self) -> NDArray[np.float64]:
        """float64 [P]."""
        return self.unseen_right / max(self.n_unseen, 1)

    @cached_property
    def harmonic_means(self) -> NDArray[np.float64]:
        """float64 [P], 0 where either accuracy is 0."""
        # Of counts rather than of rounded accuracies: one rounding, so that equal means are equal numbers.
        below = self.seen_right * self.n_unseen + self.unseen_right * self.n_seen
        means: NDArray[np.float64] = 2 * self.seen_right * self.unseen_right / np.maximum(below, 1)
        return means

    @property
    def best_seen(self) -> float:
        """Highest seen accuracy of the curve."""
        return float(self.seen_accuracy.max())

    @property
    def best_unseen(self) -> float:
        """Highest unseen accuracy of the curve."""
        return float(self.unseen_accuracy.max())

    @property
    def best_hm(self) -> float:
        """Highest harmonic mean of the curve."""
        return float(self.harmonic_means.max())

    @property
    def best_bias(self) -> float:
        """The lowest bias with the highest harmonic mean."""
        return float(self.biases[self.harmonic_means.argmax()])

    @property
    def auc(self) -> float:
        """Area below the curve by the trapezoid rule, x = unseen, y = seen accuracy; 0 if it is a single point."""
        twice = int((np.diff(self.unseen_right) * (self.seen_right[1:] + self.seen_right[:-1])).sum())
        return twice / max(2 * self.n_seen * self.n_unseen, 1)

    def record(self) -> dict[str, float | None]:
        """``best_seen``, ``best_unseen``, ``best_hm``, ``best_bias`` (None if infinite) and ``auc``."""
        return {
            "best_seen": self.best_seen,
            "best_unseen": self.best_unseen,
            "best_hm": self.best_hm,
            "best_bias": self.best_bias if np.isfinite(self.best_bias) else None,
            "auc": self.auc,
        }


def _images(margin: Any, right: Any, seen: Any) -> tuple[Array, Array, Array]:
    margin, right, seen = np.asarray(margin, np.float64), np.asarray(right), np.asarray(seen)
    for name, value in {"margin": margin, "right": right, "seen": seen}.items():
        if value.shape != (margin.size,):
            raise CaptError(f"SeenUnseenCurve: {name} must have shape [{margin.size}], found {list(value.shape)}")
        if name != "margin" and value.dtype != np.bool_:
            raise CaptError(f"SeenUnseenCurve: {name} must be bool, found {value.dtype}")
    if np.isnan(margin[right]).any():
        raise NumericError("SeenUnseenCurve: the margin of an image is NaN; are its scores finite?")
    return margin, right, seen
