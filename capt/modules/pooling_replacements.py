"""Other ways to make one vector, or one score, of an image's patches: nothing is trained."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from capt.backbones.backbone import Backbone
from capt.backbones.pooling import Pooling
from capt.errors import CaptError
from capt.modules.key_groups import KeyGroups
from capt.modules.pooling_stages import group_means, value_tokens

# Sources: ours, but for the generalised mean (arXiv 1711.02512) and late interaction (FILIP, arXiv 2111.07783).


def mean_of_values(pooling: Pooling, inputs: Tensor) -> Tensor:
    """P1: mean over patches of what each offers to the pooling row, [B, d]; no residual of the class token."""
    return value_tokens(pooling, inputs).mean(1)


def mean_of_tokens(pooling: Pooling, inputs: Tensor, *, project_first: bool = False) -> Tensor:
    """P2: mean of the final patch tokens, pooled as one token, [B, d]; or the mean of all, each pooled alone."""
    tower = pooling.tower
    patches = tower.patches(tower.advance(inputs, start=pooling.depth))
    if project_first:
        return tower.project_tokens(patches).mean(1)
    return tower.project_tokens(patches.mean(1, keepdim=True))[:, 0]


def generalised_mean(tokens: Tensor, exponent: float = 3.0) -> Tensor:
    """P3: ``(mean_j (v_j - low)^p)^(1/p) + low`` of tokens [B, N, d], with each channel's lowest value: [B, d]."""
    if exponent <= 0:
        raise CaptError(f"exponent: must be positive, found {exponent}")
    dtype, tokens = tokens.dtype, tokens.float() if tokens.dtype.itemsize < 4 else tokens
    low = tokens.amin(1, keepdim=True)
    height = (tokens.amax(1, keepdim=True) - low).clamp_min(1e-30)
    mean = ((tokens - low) / height).pow(exponent).mean(1).pow(1 / exponent)
    return (mean * height[:, 0] + low[:, 0]).to(dtype)


def top_mean(tokens: Tensor, k: int) -> Tensor:
    """P3: mean of each channel's k highest values over tokens [B, N, d], [B, d]."""
    if not 1 <= k <= tokens.shape[1]:
        raise CaptError(f"k: 1 to {tokens.shape[1]} tokens, found {k}")
    return tokens.topk(k, dim=1).values.mean(1)


def late_interaction(tokens: Tensor, texts: Tensor, temperature: float | None = 0.05) -> Tensor:
    """P4: each text's score with the patches that fit it best, [B, C].

    Args:
        tokens: [B, N, d], such as :func:`capt.modules.pooling_stages.value_tokens`.
        texts: unit norm, [C, d].
        temperature: of a soft maximum, ``t * log mean exp(s / t)``; None: the maximum.
    """
    scores = F.normalize(tokens, dim=-1) @ texts.T
    if temperature is None:
        return scores.amax(1)
    count = torch.tensor(float(scores.shape[1]), dtype=scores.dtype, device=scores.device)
    return temperature * ((scores / temperature).logsumexp(1) - count.log())


def region_features(pooling: Pooling, inputs: Tensor, cells: int = 3) -> Tensor:
    """P5: features [B, cells^2 + 1, d] of a grid of regions, each pooled alone by the same row, and of the whole.

    All regions come from one read of keys and values.

    Raises:
        CaptError: more cells a side than patches.
    """
    if not 1 <= cells <= min(pooling.grid):
        raise CaptError(f"cells: 1 to {min(pooling.grid)} a side for a {pooling.grid} grid, found {cells}")
    rows, columns = (torch.arange(n, device=inputs.device) * cells // n for n in pooling.grid)
    n_keys = pooling.values(inputs[:1]).shape[1]
    cell = 1 + (rows[:, None] * cells + columns).flatten()
    index = F.pad(cell, (n_keys - len(cell), 0))
    groups = KeyGroups(index, ("prefix", *(f"cell {i}" for i in range(cells * cells))))
    parts = pooling.features(group_means(pooling, inputs, groups)[..., 1:, :].movedim(-2, 0), inputs)
    whole = pooling.tower.project(pooling.tower.advance(inputs, start=pooling.depth))
    return torch.cat([parts.movedim(0, 1), whole[:, None]], dim=1)


def overlapping_crops(images: Tensor, count: Literal[1, 5, 9] = 5, size: float = 0.6) -> Tensor:
    """Overlapping crops of transformed images [B, 3, height, width], resized to them: [B, count, 3, height, width].

    One: the middle; five: the corners and the middle; nine: three by three.

    Raises:
        CaptError: another count, or a size outside (0, 1].
    """
    if count not in (1, 5, 9) or not 0 < size <= 1:
        raise CaptError(f"crops: 1, 5 or 9 of a size in (0, 1] of each side, found {count} of {size}")
    height, width = images.shape[2:]
    h, w = max(1, round(size * height)), max(1, round(size * width))
    tops, lefts = ([0, (full - side) // 2, full - side] for full, side in ((height, h), (width, w)))
    places = [(i, j) for i in range(3) for j in range(3) if count == 9 or (i + j) % 2 == 0] if count > 1 else [(1, 1)]
    crops = (images[:, :, tops[i] : tops[i] + h, lefts[j] : lefts[j] + w] for i, j in places)
    return torch.stack([resized(crop, height, width) for crop in crops], dim=1)


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Images [B, 3, any, any] to [B, 3, height, width], of the same dtype; on CPUs there is no bicubic in half."""
    wide = images.float() if images.dtype.itemsize < 4 else images
    return F.interpolate(wide, (height, width), mode="bicubic", antialias=True).to(images.dtype)


def crop_features(backbone: Backbone, images: Tensor, count: Literal[1, 5, 9] = 5, size: float = 0.6) -> Tensor:
    """P6: features [B, count, d] of :func:`overlapping_crops` of images; ``count`` passes through the tower."""
    crops = overlapping_crops(images, count, size)
    return torch.stack([backbone.image_features(c) for c in crops.unbind(1)], dim=1)


def blended(features: Tensor, other: Tensor, part: float = 0.3) -> Tensor:
    """P7: unit-norm ``(1 - part) * features + part * other`` of both at unit norm, [..., d]."""
    mix = (1 - part) * F.normalize(features, dim=-1) + part * F.normalize(other, dim=-1)
    return F.normalize(mix, dim=-1)


def by_confidence(
    features: Tensor, unsure: Tensor, sure: Tensor, texts: Tensor, scale: float = 100.0, threshold: float = 0.3
) -> Tensor:
    """For each image one of two re-weighted features [B, d], by the highest class probability of the plain one.

    With ``Temperature`` below 1 for ``unsure`` and above 1 for ``sure`` this is the adaptive rule of AdaptVis
    (arXiv 2503.01773), carried over from a language decoder to a pooling row.

    Args:
        features: plain ones, [B, d].
        texts: unit norm, [C, d].
    """
    confidence = (scale * F.normalize(features, dim=-1) @ texts.T).softmax(-1).amax(-1)
    return torch.where((confidence < threshold)[:, None], unsure, sure)
