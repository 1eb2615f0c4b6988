"""Evaluation of multi-label classification: average precision of each class, means by training frequency, thresholds.

Scores [N, C] are logits or probabilities, compared as float32; targets [N, C] are zero or one. Both may be arrays or
tensors. Classes are ranked a chunk at a time by one batched sort, so memory does not grow with C. Rates are fractions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from capt.data.multi_label import THRESHOLDS, frequency_groups
from capt.errors import DataError
from capt.evaluation.metrics import harmonic_mean

#: Entries that are ranked at a time (8 bytes each, a few times).
CHUNK_ENTRIES = 1 << 22
GROUPS = ("head", "medium", "tail")

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Ties = Literal["index", "together"]


# ---- ranking -----------------------------------------------------------------------------------------------------


class _Positives(NamedTuple):
    """Positives of a chunk of classes in the order of their ranks: class, image, and what is ranked down to here."""

    column: IntArray
    image: IntArray
    hits: IntArray  # positives
    rank: IntArray  # images


def _checked(scores: Any, targets: Any) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    scores, targets = (
        value.detach().float().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
        for value in (scores, targets)
    )
    if scores.ndim != 2 or scores.shape != targets.shape or not scores.size:
        raise DataError(
            f"scores and targets must have one shape [N, C] with images and classes, found {list(scores.shape)} and "
            f"{list(targets.shape)}"
        )
    scores = scores.astype(np.float32, copy=False)
    if np.isnan(scores).any():
        image, column = np.argwhere(np.isnan(scores))[0]
        raise DataError(f"scores hold NaN, first for image {image} and class {column}: it has no rank")
    positive = targets != 0
    if not (positive == targets).all():
        raise DataError("targets must be zero or one")
    return scores, positive


def _ranked(scores: NDArray[np.float32], targets: NDArray[np.bool_], ties: Ties) -> Iterator[_Positives]:
    """Positives of all classes, some classes at a time.

    An image is a 64-bit key: its score, larger ones first, then its index, then its label; one sort orders all three.
    """
    if ties not in ("index", "together"):
        raise DataError(f"ties must be 'index' or 'together', found {ties!r}")
    n_images, n_classes = scores.shape
    step = max(1, CHUNK_ENTRIES // n_images)
    index = 2 * np.arange(n_images, dtype=np.int64)
    for start in range(0, n_classes, step):
        chunk = np.ascontiguousarray(scores[:, start : start + step].T) + np.float32(0)  # -0.0 is 0.0
        bits = chunk.view(np.int32)
        bits ^= (bits >> 31) & 0x7FFFFFFF  # integers in the order of the scores
        np.invert(bits, out=bits)
        key = bits.astype(np.int64)
        key <<= 32
        key |= index
        key |= targets[:, start : start + step].T
        key.sort(axis=1)
        place = np.flatnonzero(key & 1)
        column = place // n_images
        first = np.searchsorted(column, np.arange(len(key)))  # of each class among the places
        end, hits = place, np.arange(1, len(place) + 1)
        if ties == "together":
            last = np.ones(key.shape, bool)
            np.not_equal(key[:, 1:] >> 32, key[:, :-1] >> 32, out=last[:, :-1])
            ends = np.flatnonzero(last)
            end = ends[np.searchsorted(ends, place)]
            hits = np.searchsorted(place, end, side="right")
        image = (key.reshape(-1)[place] >> 1) & 0x7FFFFFFF
        yield _Positives(column + start, image, hits - first[column], end - column * n_images + 1)


def average_precision(scores: Any, targets: Any, *, ties: Ties = "index") -> FloatArray:
    """Average precision of each class, float64 [C]; NaN for a class without a positive.

    With positives at ranks r_1 < r_2 < ..., ``AP = (1 / n_pos) * sum_k k / r_k``, not interpolated; images without any
    label count as negatives. ties: which of the images with equal scores comes first: "index", the one with the lower
    index, as in the published numbers; "together", none of them: all are retrieved at once, which is the definition of
    scikit-learn and does not depend on the order of the images. Without ties both are the same.

    Raises DataError for shapes that do not fit, NaN scores, or targets other than zero and one.
    """
    checked, positive = _checked(scores, targets)
    average: FloatArray = np.zeros(checked.shape[1])
    for found in _ranked(checked, positive, ties):
        average += np.bincount(found.column, found.hits / found.rank, checked.shape[1])
    counts = positive.sum(0)
    average /= np.maximum(counts, 1)
    average[counts == 0] = np.nan
    return average


def best_thresholds(scores: Any, targets: Any, *, default: float = 0.5) -> NDArray[np.float32]:
    """Threshold of each class with the best F1, float32 [C]; choose them on validation images, never on test images.

    A score of at least the threshold is a prediction. Each threshold is a score of a positive; of equally good ones it
    is the highest. A class without a positive gets ``default`` (0.5 suits probabilities).
    """
    checked, positive = _checked(scores, targets)
    thresholds = np.full(checked.shape[1], default, np.float32)
    counts = positive.sum(0)
    for found in _ranked(checked, positive, "together"):
        f1 = 2 * found.hits / (found.rank + counts[found.column])
        order = np.lexsort((found.rank, -f1, found.column))
        columns, first = np.unique(found.column[order], return_index=True)
        thresholds[columns] = checked[found.image[order[first]], columns]
    return thresholds


# ---- means over classes ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MultiLabelResult:
    """Average precision of every class, and its means.

    Attributes:
        average_precision: float64 [C]; NaN for a class without a positive, which every mean leaves out.
        positives: int64 [C], evaluated images with each class.
        frequency: int64 [C], training images with each class.
        thresholds: least frequency of head and of medium classes.
    """

    average_precision: FloatArray
    positives: IntArray
    frequency: IntArray
    thresholds: tuple[int, int] = THRESHOLDS

    @classmethod
    def of(
        cls,
        scores: Any,
        targets: Any,
        frequency: Any,
        *,
        thresholds: tuple[int, int] = THRESHOLDS,
        ties: Ties = "index",
    ) -> MultiLabelResult:
        """Evaluate scores [N, C]; see :func:`average_precision`."""
        precision = average_precision(scores, targets, ties=ties)
        counts = np.asarray(frequency, np.int64)
        if counts.shape != precision.shape:
            raise DataError(f"frequency must hold one number for {len(precision)} classes, found {list(counts.shape)}")
        return cls(precision, _checked(scores, targets)[1].sum(0), counts, thresholds)

    @cached_property
    def groups(self) -> dict[str, IntArray]:
        """Class ids of head, medium and tail."""
        return vars(frequency_groups(self.frequency, self.thresholds))

    @property
    def excluded(self) -> IntArray:
        """Ids of the classes without a positive."""
        return np.flatnonzero(np.isnan(self.average_precision))

    def mean(self, group: str = "total") -> float:
        """mAP of "total", "head", "medium" or "tail"; NaN if no class of it has a positive."""
        precision = self.average_precision if group == "total" else self.average_precision[self.groups[group]]
        known = precision[~np.isnan(precision)]
        return float(known.mean()) if known.size else float("nan")

    def record(self) -> dict[str, Any]:
        """mAP and number of classes by group, as JSON takes them (None: no class to average)."""
        found: dict[str, Any] = {"excluded_classes": len(self.excluded), "thresholds": list(self.thresholds)}
        for group in ("total", *GROUPS):
            members = np.arange(len(self.frequency)) if group == "total" else self.groups[group]
            value = self.mean(group)
            found[group] = {
                "map": None if np.isnan(value) else value,
                "classes": len(members),
                "counted": int((self.positives[members] > 0).sum()),
            }
        return found

    def by_frequency(self) -> list[dict[str, Any]]:
        """What a figure of average precision against frequency shows: one entry a class, the most frequent first."""
        group = {int(c): name for name, members in self.groups.items() for c in members}
        return [
            {
                "class": int(c),
                "frequency": int(self.frequency[c]),
                "group": group[int(c)],
                "positives": int(self.positives[c]),
                "average_precision": None if np.isnan(self.average_precision[c]) else float(self.average_precision[c]),
            }
            for c in np.argsort(-self.frequency, kind="stable")
        ]


# ---- predicted labels --------------------------------------------------------------------------------------------


def predicted_labels(scores: Any, *, threshold: Any = 0.5, top_k: int | None = None) -> NDArray[np.bool_]:
    """bool [N, C], scores of at least ``threshold`` (a number or [C]; None: any) among the top_k of their image.

    Of equal scores the lower class is among the top; with fewer than top_k classes all are.
    """
    scores = np.asarray(scores.detach().float().cpu() if hasattr(scores, "detach") else scores, np.float32)
    chosen = np.ones(scores.shape, bool) if threshold is None else scores >= np.asarray(threshold, np.float32)
    if top_k is not None:
        best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        among = np.zeros_like(chosen)
        np.put_along_axis(among, best, True, axis=1)
        chosen &= among
    return chosen


def label_metrics(
    scores: Any, targets: Any, *, threshold: Any = 0.5, top_k: int | None = None
) -> dict[str, float | int]:
    """Precision, recall and F1 of the predicted labels, over all entries (OP, OR, OF1) and as means over classes.

    A class that is never predicted has precision 0; classes without a positive are left out of CP, CR and CF1 and
    counted. CF1 is the F1 of the means. Predictions as in :func:`predicted_labels`.
    """
    checked, positive = _checked(scores, targets)
    chosen = predicted_labels(checked, threshold=threshold, top_k=top_k)
    right, predicted, wanted = ((chosen & positive).sum(0), chosen.sum(0), positive.sum(0))
    known = wanted > 0

    def rate(part: Any, whole: Any) -> Any:
        return np.divide(part, whole, out=np.zeros(np.shape(part)), where=np.asarray(whole) > 0)

    def mean(values: FloatArray) -> float:
        return float(values[known].mean()) if known.any() else 0.0

    overall = float(rate(right.sum(), predicted.sum())), float(rate(right.sum(), wanted.sum()))
    classes = mean(rate(right, predicted)), mean(rate(right, wanted))
    names = (("OP", "OR", "OF1"), ("CP", "CR", "CF1"))
    found: dict[str, float | int] = {"excluded_classes": int((~known).sum())}
    for labels, pair in zip(names, (overall, classes), strict=True):
        found |= dict(zip(labels, (*pair, harmonic_mean(*pair)), strict=True))
    return found
