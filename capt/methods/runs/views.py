"""Cached inputs of the training images in several views."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Views:
    """Cached inputs of the same images in several views; a batch draws the view of each image."""

    def __init__(self, views: Sequence[Callable[[Tensor], Tensor]], positions: Tensor) -> None:
        """``views``: positions int64 [n] -> inputs [n, ...]; the first is without augmentation."""
        self.views, self.positions = views, positions

    def plain(self, batch: Tensor) -> Tensor:
        """Inputs without augmentation of training images int64 [n]."""
        return self.views[0](self.positions[batch.to(self.positions.device)])

    def choose(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """A view for each training image, int64 [n], drawn from ``generator``."""
        if len(self.views) == 1:
            return torch.zeros(len(batch), dtype=torch.long)
        return torch.randint(len(self.views), (len(batch),), generator=generator)

    def take(self, batch: Tensor, choice: Tensor) -> Tensor:
        """Inputs of training images int64 [n], each in its chosen view."""
        if len(self.views) == 1:
            return self.plain(batch)
        rows = [(choice == v).nonzero().squeeze(1) for v in range(len(self.views))]  # on the CPU, as the generator is
        parts = [
            view(self.positions[batch[r].to(self.positions.device)]) for view, r in zip(self.views, rows, strict=True) if len(r)
        ]
        joined = torch.cat(parts)
        return joined[torch.argsort(torch.cat(rows)).to(joined.device)]


def rows_of(views: Sequence[Tensor]) -> Views:
    """Views of the same images given as tensors [N, ...], one a view."""

    def reader(rows: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda positions: rows[positions.to(rows.device)]

    return Views([reader(rows) for rows in views], torch.arange(len(views[0])))
