"""Random problems of compositional zero-shot learning, and their evaluation from the dense score matrix."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capt.evaluation import FrontierMeter, PairSpace


@dataclass(frozen=True)
class Problem:
    """scores float32 [N, K] of all pairs of a space; labels are positions int64 [N]."""

    space: PairSpace
    scores: Tensor
    labels: Tensor

    @property
    def seen_images(self) -> NDArray[np.bool_]:
        """bool [N]."""
        return self.space.seen[self.labels].numpy()

    def meter(self, **options: Any) -> FrontierMeter:
        """All scores, in several batches and chunks."""
        meter = FrontierMeter(self.space, **options)
        cuts = [0, len(self.space) // 3, len(self.space) // 2, len(self.space)]
        for rows in torch.arange(len(self.labels)).split(7):
            chunks = [(a, self.scores[rows, a:b]) for a, b in pairwise(cuts) if a < b]
            meter.add(reversed(chunks), self.space.pairs[self.labels[rows]])
        return meter

    def ranking(self, bias: float) -> NDArray[np.int64]:
        """Positions from best to worst int64 [N, K]: unseen before seen at equal scores, then the earlier one.

        -1 for scores of -inf.
        """
        seen = self.space.seen.numpy()
        order = np.argsort(seen, kind="stable")
        biased = (self.scores.double().numpy() + np.where(seen, 0.0, bias))[:, order]
        best = np.argsort(-biased, axis=1, kind="stable")
        return np.where(np.take_along_axis(biased, best, 1) == -np.inf, -1, order[best])

    def counts(self, bias: float, top: int = 1) -> tuple[int, int]:
        """Seen and unseen images that are right."""
        right = (self.ranking(bias)[:, :top] == self.labels.numpy()[:, None]).any(1)
        return int(right[self.seen_images].sum()), int(right[~self.seen_images].sum())

    def break_points(self) -> NDArray[np.float64]:
        """Every difference of a seen and an unseen score of one image."""
        scores, seen = self.scores.double().numpy(), self.space.seen.numpy()
        scores = np.where(scores == -np.inf, np.nan, scores)
        differences = np.unique(scores[:, seen][:, :, None] - scores[:, ~seen][:, None, :])
        return differences[np.isfinite(differences)]


def random_problem(seed: int, *, ties: bool, holes: bool = False) -> Problem:
    """A few images and pairs. ties: whole numbers as scores; holes: some scores are -inf."""
    draw = np.random.default_rng(seed)
    n_states, n_objects = draw.integers(1, 5, 2)
    every = torch.cartesian_prod(torch.arange(n_states), torch.arange(n_objects))
    kept = np.sort(draw.permutation(len(every))[: draw.integers(1, len(every) + 1)])
    space = PairSpace(every[kept], torch.from_numpy(draw.random(len(kept)) < 0.5), int(n_states), int(n_objects))
    n_images = int(draw.integers(1, 25))
    labels = draw.integers(0, len(kept), n_images)
    scores = draw.integers(-3, 4, (n_images, len(kept))) if ties else draw.normal(0, 3, (n_images, len(kept)))
    scores = scores.astype(np.float32)
    scores[np.arange(n_images), labels] += draw.integers(0, 3)
    if holes:
        scores[draw.random(scores.shape) < 0.3] = -np.inf
    return Problem(space, torch.from_numpy(scores), torch.from_numpy(labels))


def between(break_points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Every break point, a bias between any two, and one beyond each end, ascending."""
    if not break_points.size:
        return np.zeros(1)
    middle = (break_points[1:] + break_points[:-1]) / 2
    return np.unique(np.concatenate([break_points, middle, [break_points[0] - 1, break_points[-1] + 1]]))


def summary(points: list[tuple[int, int]], n_seen: int, n_unseen: int) -> dict[str, float]:
    """Metrics of (seen right, unseen right) in list order, by exact fractions."""
    rates = [(Fraction(s, max(n_seen, 1)), Fraction(u, max(n_unseen, 1))) for s, u in points]
    area = sum((u1 - u0) * (s0 + s1) / 2 for (s0, u0), (s1, u1) in pairwise(rates))
    return {
        "best_seen": float(max(s for s, _ in rates)),
        "best_unseen": float(max(u for _, u in rates)),
        "best_hm": float(max(2 * s * u / (s + u) if s + u else Fraction(0) for s, u in rates)),
        "auc": float(area),
    }
