"""Is a concept still there: ranks of one concept among others, stage by stage, and where it vanishes."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from capt.errors import CaptError

# Source: ours.


def concept_scores(vectors: Tensor, texts: Tensor) -> Tensor:
    """Cosines [..., K] of vectors [..., d] with K concepts [K, d]."""
    return F.normalize(vectors, dim=-1) @ F.normalize(texts, dim=-1).T


def concept_present(scores: Tensor, concept: Tensor, k: int = 3) -> Tensor:
    """Whether a concept is among the k best, bool [B, ...]; of equal scores all count.

    Args:
        scores: [B, ..., K].
        concept: int64 [B], the concept of each image.
    """
    if not 1 <= k <= scores.shape[-1]:
        raise CaptError(f"k: 1 to {scores.shape[-1]} concepts, found {k}")
    index = concept.view(-1, *[1] * (scores.ndim - 1)).expand(*scores.shape[:-1], 1)
    return ((scores > scores.gather(-1, index)).sum(-1)) < k


def sparse_present(weights: Tensor, concept: Tensor, k: int = 10, floor: float = 1e-4) -> Tensor:
    """The same on sparse non-negative weights [B, ..., K]: among the k largest, and above ``floor``."""
    index = concept.view(-1, *[1] * (weights.ndim - 1)).expand(*weights.shape[:-1], 1)
    return concept_present(weights, concept, min(k, weights.shape[-1])) & (weights.gather(-1, index)[..., 0] > floor)


def vanished(in_patches: Tensor, in_feature: Tensor, objects: Tensor) -> Tensor:
    """Concept present in at least one patch of its object and absent from the feature, bool [B].

    Args:
        in_patches: bool [B, N]. in_feature: bool [B]. objects: bool [B, N] or [N], patches of the object.
    """
    return (in_patches & objects).any(-1) & ~in_feature


def margin(scores: Tensor, concept: Tensor, absent: Tensor) -> Tensor:
    """Score of each image's concept above the mean of those that are not in it, [B].

    Args:
        scores: [B, K]. concept: int64 [B]. absent: bool [B, K], concepts that the image does not show.
    """
    if not bool(absent.any(-1).all()):
        raise CaptError("margin: every image needs at least one concept that it does not show")
    others = (scores * absent).sum(-1) / absent.sum(-1)
    return scores.gather(-1, concept[:, None])[:, 0] - others
