"""What one would write without the op: two ways to put torch's convolution around token layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def permute(tokens: Tensor, weight: Tensor, alpha: float, grid: tuple[int, int], n_prefix: int) -> Tensor:
    """The usual form: copy to [B, D, H, W], convolve, copy back, add, concatenate."""
    height, width = grid
    batch, _, dim = tokens.shape
    stop = n_prefix + height * width
    patches = tokens[:, n_prefix:stop]
    image = patches.transpose(1, 2).reshape(batch, dim, height, width).contiguous()
    mixed = F.conv2d(image, weight[:, None], padding=1, groups=dim).flatten(2).transpose(1, 2)
    return torch.cat([tokens[:, :n_prefix], patches + alpha * mixed, tokens[:, stop:]], dim=1)


def channels_last(tokens: Tensor, weight: Tensor, alpha: float, grid: tuple[int, int], n_prefix: int) -> Tensor:
    """The careful form: tokens are a channels-last image already; one clone, updated in place."""
    height, width = grid
    stop = n_prefix + height * width
    image = tokens[:, n_prefix:stop].unflatten(1, grid).permute(0, 3, 1, 2)
    kernel = weight[:, None].to(memory_format=torch.channels_last)
    mixed = F.conv2d(image, kernel, padding=1, groups=tokens.shape[2]).permute(0, 2, 3, 1).flatten(1, 2)
    out = tokens.clone()
    out[:, n_prefix:stop].add_(mixed, alpha=alpha)
    return out


RIVALS = {"permute": permute, "channels_last": channels_last}
