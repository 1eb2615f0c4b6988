"""Is one method better than another on the same test images, or is it chance?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt.errors import DataError


def paired_difference(
    ours: Sequence[Any],
    theirs: Sequence[Any],
    combine: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Difference of a score and its 95 % interval, by a paired bootstrap over test images.

    Images are drawn with replacement inside every test set, the same ones for both methods, so what both get right
    or wrong cancels. Several seeds of one method enter as the share of seeds that got an image right.

    Args:
        ours, theirs: for each test set float or bool [N], how right each image was, in [0, 1].
        combine: accuracies float [S, draws] of the S test sets -> score [draws], such as the harmonic mean.
        draws: bootstrap samples.

    Returns:
        (difference, lower end, upper end).

    Source: Efron's percentile bootstrap.
    """
    if len(ours) != len(theirs) or any(len(a) != len(b) or not len(a) for a, b in zip(ours, theirs, strict=True)):
        raise DataError("paired_difference: both methods need the same, non-empty test sets")
    generator = np.random.default_rng(seed)
    exact, sampled = [], []
    for a, b in zip(ours, theirs, strict=True):
        both = np.stack([np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)])
        # How often each image is drawn; a matrix of counts is small for test sets of some thousand images.
        counts = generator.multinomial(both.shape[1], np.full(both.shape[1], 1 / both.shape[1]), size=draws)
        exact.append(both.mean(1))
        sampled.append(both @ counts.T / both.shape[1])
    score = [combine(np.stack([one[side] for one in sampled])) for side in (0, 1)]
    point = [combine(np.stack([one[side : side + 1] for one in exact])) for side in (0, 1)]
    low, high = np.quantile(score[0] - score[1], [0.025, 0.975])
    return float(point[0][0] - point[1][0]), float(low), float(high)


def harmonic_means(accuracies: NDArray[np.float64]) -> NDArray[np.float64]:
    """Harmonic mean over the first axis of float [S, n]; 0 where any is 0."""
    return np.asarray(len(accuracies) / (1 / np.maximum(accuracies, 1e-12)).sum(0))
