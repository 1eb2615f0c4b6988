"""Accuracy, sparse confusion counts and the correction metrics of CAPT.

Everything here takes arrays of class ids (numpy, torch on any device, or lists) and counts with integers,
so results do not depend on the order of the samples. Rates are fractions in [0, 1], never percent.
Confusions are kept as (true, predicted, count) triples: memory grows with the number of different mistakes,
not with the square of the number of classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from capt.errors import DataError

IntArray = NDArray[np.int64]


class ConfusedPair(NamedTuple):
    """How often two classes were mixed up, in either direction.

    ``first`` < ``second`` are class ids; ``first_as_second`` counts samples of ``first`` predicted as ``second``.
    """

    first: int
    second: int
    total: int
    first_as_second: int
    second_as_first: int


@dataclass(frozen=True)
class ConfusionCounts:
    """Confusion matrix as its non-empty cells, sorted by (true class, predicted class).

    Attributes:
        labels: int64 [n_cells], true class of a cell.
        predictions: int64 [n_cells], predicted class of a cell.
        counts: int64 [n_cells], samples in the cell, all > 0.
        n_classes: side of the (never materialised) matrix.
    """

    labels: IntArray
    predictions: IntArray
    counts: IntArray
    n_classes: int

    @property
    def total(self) -> int:
        """Samples counted, right and wrong ones."""
        return int(self.counts.sum())

    def mistakes(self) -> ConfusionCounts:
        """The same counts without the diagonal."""
        wrong = self.labels != self.predictions
        return ConfusionCounts(self.labels[wrong], self.predictions[wrong], self.counts[wrong], self.n_classes)

    def lookup(self, labels: IntArray, predictions: IntArray) -> IntArray:
        """Counts of the given cells, int64 [n]; 0 for empty ones."""
        keys = self.labels * self.n_classes + self.predictions
        wanted = labels * self.n_classes + predictions
        if not keys.size:
            return np.zeros(wanted.shape, np.int64)
        position = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
        return np.where(keys[position] == wanted, self.counts[position], 0)


def _class_ids(values: Any, name: str, n_classes: int | None = None) -> IntArray:
    if hasattr(values, "detach"):  # a torch tensor, possibly on a GPU
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.ndim != 1:
        raise DataError(f"{name}: expected a vector of class ids, found shape {array.shape}")
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.dtype.kind not in "iu":
        raise DataError(f"{name}: expected integer class ids, found {array.dtype}")
    ids = array.astype(np.int64)
    if ids.min() < 0:
        raise DataError(f"{name}: class id {ids.min()} is negative")
    if n_classes is not None and ids.max() >= n_classes:
        raise DataError(f"{name}: class id {ids.max()} found, but there are only {n_classes} classes")
    return ids


def _aligned(labels: Any, predictions: Any, n_classes: int | None = None) -> tuple[IntArray, IntArray]:
    true, predicted = _class_ids(labels, "labels", n_classes), _class_ids(predictions, "predictions", n_classes)
    if true.size != predicted.size:
        raise DataError(f"{true.size} labels but {predicted.size} predictions: give one prediction per image")
    return true, predicted


def accuracy(labels: Any, predictions: Any) -> float:
    """Fraction of samples whose prediction equals the label.

    Args:
        labels: integer class ids [N].
        predictions: integer class ids [N].

    Raises:
        DataError: no samples, lengths differ, or the values are not class ids.
    """
    true, predicted = _aligned(labels, predictions)
    if not true.size:
        raise DataError("accuracy of no samples is undefined: the split holds no images")
    return float(np.mean(true == predicted))


def harmonic_mean(first: float, second: float) -> float:
    """Harmonic mean ``2ab / (a+b)`` of two rates (or percentages) >= 0; 0 when both are 0."""
    if not (first >= 0 and second >= 0):
        raise DataError(f"harmonic mean needs two numbers >= 0, found {first} and {second}")
    return 2.0 * first * second / (first + second) if first + second > 0 else 0.0


def mean_std(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, population and sample standard deviation of one number per seed.

    The population form (divide by n) is the one printed by CoOp and its descendants; the sample form
    (divide by n - 1) is the unbiased estimate, 0 for a single seed by convention here.
    """
    numbers = np.asarray(values, np.float64)
    if not numbers.size:
        raise DataError("mean of no values is undefined: there are no seeds")
    sample = float(numbers.std(ddof=1)) if numbers.size > 1 else 0.0
    return float(numbers.mean()), float(numbers.std()), sample


def confusion_counts(labels: Any, predictions: Any, n_classes: int) -> ConfusionCounts:
    """Sparse confusion matrix of predictions.

    Args:
        labels: integer class ids [N].
        predictions: integer class ids [N].
        n_classes: both must lie below it.
    """
    true, predicted = _aligned(labels, predictions, n_classes)
    keys, counts = np.unique(true * n_classes + predicted, return_counts=True)
    return ConfusionCounts(keys // max(n_classes, 1), keys % max(n_classes, 1), counts.astype(np.int64), n_classes)


def top_confused_pairs(counts: ConfusionCounts, n: int) -> list[ConfusedPair]:
    """The ``n`` unordered class pairs mixed up most often, both directions added.

    Ties go to the pair with the lower ids, so the list is the same for any order of the samples.
    """
    wrong = counts.mistakes()
    first, second = np.minimum(wrong.labels, wrong.predictions), np.maximum(wrong.labels, wrong.predictions)
    keys, cell_pair = np.unique(first * counts.n_classes + second, return_inverse=True)
    forward = np.zeros(keys.size, np.int64)
    backward = np.zeros(keys.size, np.int64)
    is_forward = wrong.labels < wrong.predictions
    np.add.at(forward, cell_pair[is_forward], wrong.counts[is_forward])
    np.add.at(backward, cell_pair[~is_forward], wrong.counts[~is_forward])
    order = np.lexsort((keys, -(forward + backward)))[: max(n, 0)]
    return [
        ConfusedPair(
            first=int(keys[i]) // counts.n_classes,
            second=int(keys[i]) % counts.n_classes,
            total=int(forward[i] + backward[i]),
            first_as_second=int(forward[i]),
            second_as_first=int(backward[i]),
        )
        for i in order
    ]


def _rate(part: int, whole: int) -> float:
    # "nothing to correct" counts as "nothing corrected", so that every rate is a number and can be averaged
    return part / whole if whole else 0.0


def correction_metrics(
    labels: Any,
    base_predictions: Any,
    new_predictions: Any,
    n_classes: int,
    *,
    thresholds: Sequence[int] = (1, 3, 5),
) -> dict[str, float]:
    """How many mistakes of a base model another model repairs, and what that costs.

    With W0 the samples that the base model gets wrong, and N0, N1 the confusion counts (off the diagonal)
    before and after:

    - ``sample_correction_rate``: share of W0 that is now right;
    - ``pair_resolution_rate_m<m>``: among ordered (true, predicted) cells with N0 >= m, the share whose count at
      least halved; ``pair_resolution_rate`` repeats the first threshold;
    - ``net_reduction``: (sum N0 - sum N1) / sum N0, negative when mistakes were added;
    - ``new_error_rate``: share of the samples outside W0 that are now wrong.

    A rate over an empty set is 0; ``n_samples``, ``n_mistakes`` and ``n_pairs_m<m>`` say how large the sets were.
    Source: ours; the paper's own formula behind its correction rate is not printed.

    Args:
        labels: integer class ids [N].
        base_predictions: integer class ids [N] of the reference model.
        new_predictions: integer class ids [N] of the model that is judged.
        n_classes: all ids lie below it.
        thresholds: the values of m, the first being the main one.
    """
    true, before = _aligned(labels, base_predictions, n_classes)
    _, after = _aligned(labels, new_predictions, n_classes)
    wrong_before, wrong_after = before != true, after != true
    n_mistakes = int(wrong_before.sum())
    result = {
        "sample_correction_rate": _rate(int((wrong_before & ~wrong_after).sum()), n_mistakes),
        "net_reduction": _rate(n_mistakes - int(wrong_after.sum()), n_mistakes),
        "new_error_rate": _rate(int((~wrong_before & wrong_after).sum()), int((~wrong_before).sum())),
        "n_samples": float(true.size),
        "n_mistakes": float(n_mistakes),
    }
    cells = confusion_counts(true, before, n_classes).mistakes()
    remaining = confusion_counts(true, after, n_classes).lookup(cells.labels, cells.predictions)
    halved = 2 * remaining <= cells.counts
    for m in thresholds:
        eligible = cells.counts >= m
        result[f"pair_resolution_rate_m{m}"] = _rate(int((eligible & halved).sum()), int(eligible.sum()))
        result[f"n_pairs_m{m}"] = float(eligible.sum())
    if thresholds:
        result["pair_resolution_rate"] = result[f"pair_resolution_rate_m{thresholds[0]}"]
    return result
