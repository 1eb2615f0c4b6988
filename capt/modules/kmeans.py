"""Spherical K-means for small sets of unit vectors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def spherical_kmeans(points: Tensor, n_centres: int, *, seed: int = 0, max_iterations: int = 50) -> Tensor:
    """Cluster directions by cosine similarity.

    Args:
        points: float [N, d]; normalised here. Rows that are not finite or are zero are ignored.
        n_centres: K; with fewer than K distinct usable rows, that many centres come back.
        seed: of the first centre and of nothing else.
        max_iterations: hard cap, so that the loop ends on any input.

    Returns:
        float32 [min(K, distinct rows), d], unit norm, deterministic for a seed.
    """
    points = points.float()
    usable = torch.isfinite(points).all(1) & (points.norm(dim=1) > 1e-12)
    points = torch.unique(F.normalize(points[usable], dim=1), dim=0)
    n_centres = min(n_centres, len(points))
    if n_centres <= 0:
        return points[:0]
    # Farthest-point start: the first centre is drawn, each next one is the point least like those chosen.
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = points @ points[chosen[0]]
    for _ in range(n_centres - 1):
        nearest[chosen] = torch.inf
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, points @ points[chosen[-1]])
    centres = points[chosen]
    previous = None
    for _ in range(max_iterations):
        assignment = (points @ centres.T).argmax(1)
        if previous is not None and torch.equal(assignment, previous):
            break
        previous = assignment
        sums = torch.zeros_like(centres).index_add_(0, assignment, points)
        # An empty cluster, or one whose members cancel out, keeps its centre.
        kept = sums.norm(dim=1, keepdim=True) < 1e-12
        centres = torch.where(kept, centres, F.normalize(sums, dim=1))
    return centres
