"""Texts that span what a component writes: a name for the role of an attention head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from capt.errors import CaptError


class TextSpan(NamedTuple):
    """texts: int64 [r], in the order they were found. explained: [r], part of the variance that all up to it span."""

    texts: Tensor
    explained: Tensor


def text_span(contributions: Tensor, texts: Tensor, n_texts: int = 20, rank: int = 80) -> TextSpan:
    """Pick texts greedily by how much a head's contributions vary along them.

    Args:
        contributions: [n, E], what one head wrote for n images, tokens summed (``DirectEffects.heads()[:, l, h]``).
        texts: [m, E], candidates.
        n_texts: how many to pick.
        rank: texts are projected on that many leading directions of the contributions first.

    Raises:
        CaptError: shapes that do not fit, or more texts asked for than there are.

    Source: TextSpan (arXiv 2310.05916).
    """
    if contributions.ndim != 2 or texts.ndim != 2 or contributions.shape[1] != texts.shape[1]:
        raise CaptError(
            f"text span: expected [n, E] and [m, E], found {list(contributions.shape)} and {list(texts.shape)}"
        )
    if not 1 <= n_texts <= len(texts):
        raise CaptError(f"text span: n_texts={n_texts} of {len(texts)} texts; ask for 1 to {len(texts)}")
    directions = torch.linalg.svd(contributions, full_matrices=False).Vh[:rank]
    left = texts @ directions.T @ directions
    rest = contributions - contributions.mean(0)
    total = rest.square().sum()
    chosen: list[int] = []
    explained: list[Tensor] = []
    for _ in range(n_texts):
        spread = (rest @ left.T).var(0, correction=0)
        spread[chosen] = -1.0
        best = int(spread.argmax())
        direction = left[best] / left[best].norm().clamp_min(1e-30)
        rest = rest - (rest @ direction)[:, None] * direction
        left = left - (left @ direction)[:, None] * direction
        chosen.append(best)
        explained.append(1 - rest.square().sum() / total.clamp_min(1e-30))
    return TextSpan(torch.tensor(chosen, device=texts.device), torch.stack(explained))
