"""An embedding as a sparse non-negative sum of named concepts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from capt.errors import CaptError, NumericError

CHECK_EVERY = 10


class LassoSolution(NamedTuple):
    """weights [n, c], at least 0; iterations int64 [n], up to convergence; converged bool [n]."""

    weights: Tensor
    iterations: Tensor
    converged: Tensor


class SparseConcepts:
    """A dictionary of concepts in the space of centred image embeddings.

    Attributes:
        names: of the concepts.
        dictionary: [c, E], unit-norm differences of unit-norm texts to their mean.
        image_mean: [E], mean unit-norm embedding of reference images *of the same stage*: the mean of final
            embeddings is wrong for patch tokens.

    Source: SpLiCE (arXiv 2402.10376).
    """

    def __init__(self, texts: Tensor, image_mean: Tensor, names: Sequence[str]) -> None:
        """``texts`` [c, E].

        Raises:
            CaptError: shapes that do not fit, fewer than two concepts, or a name used twice.
        """
        if texts.ndim != 2 or len(texts) < 2 or image_mean.shape != texts.shape[1:]:
            raise CaptError(
                f"sparse concepts: expected texts [at least 2, E] and image_mean [E], found {list(texts.shape)} and "
                f"{list(image_mean.shape)}"
            )
        if len(names) != len(texts) or len(set(names)) != len(names):
            raise CaptError(
                f"sparse concepts: {len(texts)} texts need as many different names, found {len(set(names))}"
            )
        unit = F.normalize(texts, dim=-1)
        self.names = tuple(names)
        self.dictionary = F.normalize(unit - unit.mean(0), dim=-1)
        self.image_mean = image_mean

    def centred(self, vectors: Tensor) -> Tensor:
        """Unit-norm differences of unit-norm vectors [..., E] to the image mean."""
        return F.normalize(F.normalize(vectors, dim=-1) - self.image_mean, dim=-1)

    def decompose(self, vectors: Tensor, penalty: float = 0.2, *, start: Tensor | None = None) -> Tensor:
        """Weights [..., c] of vectors [..., E].

        Args:
            penalty: lambda of ``|w C - z|^2 + lambda sum w``; 0.15 to 0.25 keeps 5 to 20 concepts.
            start: weights of a similar problem, such as those of a larger penalty.
        """
        flat = self.centred(vectors).reshape(-1, vectors.shape[-1])
        begin = None if start is None else start.reshape(len(flat), -1)
        weights = nonnegative_lasso(self.dictionary, flat, penalty, start=begin).weights
        return weights.reshape(*vectors.shape[:-1], -1)

    def reconstruct(self, weights: Tensor) -> Tensor:
        """Unit-norm embeddings [..., E] of weights [..., c]."""
        return F.normalize(F.normalize(weights @ self.dictionary, dim=-1) + self.image_mean, dim=-1)

    def quality(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """Cosines of vectors [..., E] with what their weights make, [...]."""
        return (self.reconstruct(weights) * F.normalize(vectors, dim=-1)).sum(-1)

    def described(self, weights: Tensor, most: int = 10) -> list[tuple[str, float]]:
        """Names and weights of the largest of one embedding's weights [c]; only those above 0."""
        order = weights.argsort(descending=True, stable=True)[:most]
        return [(self.names[i], float(weights[i])) for i in order.tolist() if weights[i] > 0]


def nonnegative_lasso(
    dictionary: Tensor, targets: Tensor, penalty: float, *, rho: float = 5.0, tolerance: float = 1e-6,
    max_iterations: int = 2000, start: Tensor | None = None,
) -> LassoSolution:  # fmt: skip
    """``argmin over w >= 0 of |w C - z|^2 + penalty * sum w`` for many targets at once, by ADMM.

    The c x c inverse of the linear step is taken through E x E (Woodbury), so an iteration is two products
    n x c x E; targets that are done leave the batch.

    Args:
        dictionary: C, [c, E].
        targets: z, [n, E].
        penalty: lambda. In scikit-learn's Lasso it is ``alpha = lambda / (2 E)``.
        rho: of the augmented Lagrangian.
        tolerance: of primal and dual residual, Euclidean.
        start: weights to start from, [n, c].

    Raises:
        CaptError: a penalty below 0 or shapes that do not fit.
        NumericError: targets or dictionary with NaN or Inf.

    Source: ADMM as in SpLiCE (arXiv 2402.10376); Woodbury form, shrinking batch: ours.
    """
    n_concepts, width = dictionary.shape
    if penalty < 0 or targets.ndim != 2 or targets.shape[1] != width:
        raise CaptError(
            f"non-negative lasso: expected targets [n, {width}] and a penalty of at least 0, found "
            f"{list(targets.shape)} and {penalty}"
        )
    if not bool(torch.isfinite(dictionary).all()) or not bool(torch.isfinite(targets).all()):
        raise NumericError("non-negative lasso: targets and dictionary must be finite")
    eye = torch.eye(width, dtype=dictionary.dtype, device=dictionary.device)
    inner = torch.linalg.solve(0.5 * rho * eye + dictionary.T @ dictionary, dictionary.T)  # [E, c]
    pull = 2 * targets @ dictionary.T  # [n, c]
    solved = targets.new_zeros(len(targets), n_concepts)
    iterations = torch.full((len(targets),), max_iterations, device=targets.device)
    converged = torch.zeros(len(targets), dtype=torch.bool, device=targets.device)
    rows = torch.arange(len(targets), device=targets.device)
    y = solved.clone() if start is None else start.clone().to(targets)
    u = torch.zeros_like(y)
    for step in range(1, max_iterations + 1):
        if not len(rows):
            break
        right = torch.add(pull, y - u, alpha=rho)
        x = torch.addmm(right, right @ dictionary, inner, alpha=-1.0).div_(rho)
        before = y
        u = u.add_(x)
        y = (u - penalty / rho).clamp_min_(0.0)
        u = u.sub_(y)
        if step % CHECK_EVERY and step != max_iterations:
            continue
        done = ((x - y).norm(dim=-1) < tolerance) & (rho * (y - before).norm(dim=-1) < tolerance)
        if step == max_iterations:
            converged[rows] = done
            solved[rows] = y
            break
        if bool(done.any()):
            left = rows[done]
            solved[left], iterations[left], converged[left] = y[done], step, True
            rows, pull, y, u = (part[~done] for part in (rows, pull, y, u))
    return LassoSolution(solved, iterations, converged)
