"""Many re-weightings of one set of images: what enters the last aggregation is computed once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from capt.backbones.backbone import Backbone
from capt.errors import DataError
from capt.modules.key_groups import CenterGroups, Grouping
from capt.modules.redistributed_row import mixed_values
from capt.modules.redistribution import Redistribution


class PoolingSweep:
    """Keeps the inputs of the last aggregation, L' * D numbers an image, and pools them under any rule.

    Attributes:
        inputs: [N, L', D].

    Source: ours.
    """

    def __init__(self, backbone: Backbone, batches: Tensor | Iterable[Tensor], batch: int = 64) -> None:
        """Run the image tower up to its last aggregation, once.

        Args:
            batches: transformed images [N, 3, height, width], or batches of them.
            batch: images pooled together.

        Raises:
            CaptError: a pooling that cannot be taken apart.
            DataError: no images, or of another size.
        """
        self.pooling, self.batch = backbone.tower.pooling(), batch
        parts = batches.split(batch) if isinstance(batches, Tensor) else batches
        with torch.no_grad():
            kept = [self.pooling.inputs(part.to(device=backbone.device, dtype=backbone.dtype)) for part in parts]
        if not kept:
            raise DataError("sweep: no images")
        self.inputs = torch.cat(kept)

    def __len__(self) -> int:
        """Images."""
        return len(self.inputs)

    @torch.no_grad()
    def features(self, rules: Sequence[Redistribution], grouping: Grouping | None = None) -> Tensor:
        """Un-normalised features [M, N, d] of M rules, equal to those of ``redistributed`` backbones up to rounding.

        Args:
            grouping: default: centre and off-centre patches.
        """
        grouping = grouping or CenterGroups()
        found = []
        for start in range(0, len(self), self.batch):
            chosen = slice(start, start + self.batch)
            inputs = self.inputs[chosen]
            mixed = mixed_values(self.pooling, inputs, rules, grouping.part(chosen))
            found.append(self.pooling.features(mixed, inputs))
        return torch.cat(found, dim=1)
