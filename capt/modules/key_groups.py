"""Which keys of a pooling row belong together: centre and rest, sinks, regions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from capt.errors import CaptError

SINK_NORM = 4.0
CENTER_NAMES: tuple[str, ...] = ("prefix", "center", "off")


class PatchPositions(NamedTuple):
    """Centres of the patches of a grid, row-major, in [-1, 1] a side: float32 [N] each.

    x, y: right and down. radius: Euclidean distance from the middle over sqrt(2), 1 in the corners of the picture.
    square_radius: the larger of |x| and |y|.
    """

    x: Tensor
    y: Tensor
    radius: Tensor
    square_radius: Tensor


def patch_positions(grid: tuple[int, int], device: torch.device | str | None = None) -> PatchPositions:
    """Positions of the H*W patches of a grid (H, W)."""
    down, right = ((torch.arange(n, device=device) + 0.5) / n * 2 - 1 for n in grid)
    y, x = (axis.flatten() for axis in torch.meshgrid(down, right, indexing="ij"))
    return PatchPositions(x, y, (x.square() + y.square()).sqrt() / 2**0.5, torch.maximum(x.abs(), y.abs()))


class KeyGroups(NamedTuple):
    """Each key in one group.

    labels: int64 [L], or [B, L] where the images differ: the group of each key. names: of the groups; the first is the
    prefix, whose keys are no patches.
    """

    labels: Tensor
    names: tuple[str, ...]

    def starting_with(self, *words: str) -> Tensor:
        """bool [G]: groups whose name starts with one of the words."""
        chosen = [any(name.startswith(word) for word in words) for name in self.names]
        return torch.tensor(chosen, device=self.labels.device)

    def counts(self) -> Tensor:
        """Keys of each group, int64 [G] or [B, G]."""
        return F.one_hot(self.labels, len(self.names)).sum(-2)


@dataclass(frozen=True)
class CenterGroups:
    """Prefix, centre and off-centre patches, and within the two those that are sinks.

    Attributes:
        radius: patches with ``square_radius`` at most this are the centre: 1/2 is a quarter of the area, 1/3 the middle
            cell of a 3 x 3 grid.
        sinks: tell apart tokens whose norm is beyond ``SINK_NORM`` times the median of their picture.
        seed: a number puts as many randomly chosen patches in the centre's place: the control of every re-weighting.

    Source: ours; sinks by norm after "Vision Transformers Need Registers" (arXiv 2309.16588).
    """

    radius: float = 0.5
    sinks: bool = False
    seed: int | None = None

    def center(self, grid: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
        """bool [N], patches of the centre.

        Raises:
            CaptError: none or all of them are.
        """
        middle = patch_positions(grid, device).square_radius <= self.radius + 1e-6
        if not 0 < int(middle.sum()) < len(middle):
            raise CaptError(
                f"center groups: radius {self.radius} puts {int(middle.sum())} of {len(middle)} patches of a "
                f"{grid[0]} x {grid[1]} grid in the center; take one that leaves some on both sides"
            )
        if self.seed is not None:
            order = torch.randperm(len(middle), generator=torch.Generator().manual_seed(self.seed))
            middle = middle[order.to(middle.device)]
        return middle

    def of(self, grid: tuple[int, int], n_keys: int, tokens: Tensor) -> KeyGroups:
        """Groups of the last H*W of ``n_keys`` keys; ``tokens`` [B, L', D], whose last H*W are the patches."""
        off = (~self.center(grid, tokens.device)).long()  # 0 in the centre
        index, names = 1 + off, CENTER_NAMES
        if self.sinks:
            index = index + 2 * sink_mask(tokens[:, -len(off) :]).long()
            names = (*CENTER_NAMES, "center sink", "off sink")
        return KeyGroups(_with_prefix(index, n_keys), names)

    def part(self, images: slice) -> CenterGroups:
        """The grouping of some of the images: itself."""
        return self

    def record(self) -> dict[str, object]:
        """What identifies it."""
        return {"kind": "center", "radius": self.radius, "sinks": self.sinks, "seed": self.seed}


@dataclass(frozen=True)
class RegionGroups:
    """Prefix, region and rest.

    Attributes:
        mask: bool [N] or [B, N], patches of the region.
    """

    mask: Tensor

    def of(self, grid: tuple[int, int], n_keys: int, tokens: Tensor) -> KeyGroups:
        """Groups of the last H*W of ``n_keys`` keys.

        Raises:
            CaptError: the mask has another grid, or an image without a region.
        """
        n = grid[0] * grid[1]
        if self.mask.dtype != torch.bool or self.mask.shape not in ((n,), (len(tokens), n)):
            raise CaptError(
                f"region: expected bool [{n}] or [{len(tokens)}, {n}] for a {grid[0]} x {grid[1]} grid, found "
                f"{self.mask.dtype} {list(self.mask.shape)}"
            )
        if not bool(self.mask.any(-1).all()):
            raise CaptError("region: an image without any patch in its region; choose at least one patch each")
        return KeyGroups(_with_prefix(2 - self.mask.to(tokens.device).long(), n_keys), ("prefix", "region", "rest"))

    def part(self, images: slice) -> RegionGroups:
        """The grouping of some of the images."""
        return self if self.mask.ndim == 1 else RegionGroups(self.mask[images])

    def record(self) -> dict[str, object]:
        """What identifies it."""
        return {"kind": "region", "mask": self.mask.long().tolist()}


Grouping = CenterGroups | RegionGroups


def sink_mask(patches: Tensor) -> Tensor:
    """bool [B, N]: tokens [B, N, D] whose norm is beyond ``SINK_NORM`` times the median of their picture."""
    norm = patches.detach().float().norm(dim=-1)
    mask: Tensor = norm > SINK_NORM * norm.median(-1, keepdim=True).values
    return mask


def _with_prefix(index: Tensor, n_keys: int) -> Tensor:
    """Patch groups [..., N] behind zeros for the other keys, [..., L]."""
    return F.pad(index, (n_keys - index.shape[-1], 0))
