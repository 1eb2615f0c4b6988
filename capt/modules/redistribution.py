"""Attention redistribution: rules that move the weight of a pooling row from the centre of the picture outwards."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from capt.backbones.digest import strong_digest
from capt.errors import CaptError
from capt.modules.key_groups import KeyGroups, patch_positions

HeadChoice = tuple[int, ...] | Literal["biased"] | None
RadialShape = Literal["r", "r2", "square", "step"]

BIASED_RATIO, BIASED_PATCH_SHARE = 1.25, 0.2


@dataclass(frozen=True, kw_only=True)
class Redistribution:
    """One way to re-weight a pooling row; the classes below say which.

    A rule acts in two places. *Within* a group of keys the weights are those of scores that were scaled or got a bias;
    *between* groups the shares are moved. So a re-weighted row needs, of every group, only its mean value and its
    mass, and no row is ever written (see :func:`capt.ops.attention_readout`).

    Attributes:
        keep_prefix: class token and registers keep the share that they had.
        heads: which heads it acts on: these, or those of an image that prefer its centre (``"biased"``: centre mass
            above 1.25 times its area, patch share at least 0.2); None: all.

    Source: ours (one family for all readings of "attention redistribution"); the group form as well.
    """

    keep_prefix: bool = True
    heads: HeadChoice = None

    @property
    def neutral(self) -> bool:
        """Whether it changes nothing."""
        raise NotImplementedError

    @property
    def temperature(self) -> float:
        """Factor of the patches' scores."""
        return 1.0

    def bias(self, grid: tuple[int, int]) -> Tensor | None:
        """What is added to the patches' scores, float32 [H or 1, N]; None: nothing."""
        return None

    def moved(self, shares: Tensor, groups: KeyGroups) -> Tensor:
        """Shares of the groups [..., G] after weight was moved between them."""
        return shares

    @property
    def mixture(self) -> tuple[float, tuple[str, ...]]:
        """Part of the patches' weight that is spread evenly, and beginnings of the groups that get it."""
        return 0.0, ()

    def shares(self, before: Tensor, biased: Tensor, groups: KeyGroups) -> Tensor:
        """New shares [..., G] of the groups.

        Args:
            before: shares of the unchanged row, [..., G].
            biased: shares of the row with scaled and biased scores.
        """
        shares = self.moved(biased, groups)
        if not self.keep_prefix:
            return _normalised(shares)
        patches = _normalised(shares[..., 1:]) * before[..., 1:].sum(-1, keepdim=True)
        return torch.cat([before[..., :1], patches], dim=-1)

    def chosen_heads(self, before: Tensor, groups: KeyGroups) -> Tensor | None:
        """bool, broadcast to [..., H]: heads it acts on, from their shares before [..., H, G]; None: all.

        Raises:
            CaptError: no such head, or "biased" without groups of a centre.
        """
        if self.heads is None:
            return None
        n_heads = before.shape[-2]
        if self.heads == "biased":
            center = groups.starting_with("center")
            if not center.any():
                raise CaptError(f"heads='biased' needs groups with a center, found {groups.names}")
            counts = groups.counts().to(before.dtype)
            area = (counts * center).sum(-1) / counts[..., 1:].sum(-1)
            area = area if area.ndim == 0 else area[:, None]
            patches = before[..., 1:].sum(-1)
            ratio = (before * center).sum(-1) / (patches * area).clamp_min(1e-30)
            return (ratio > BIASED_RATIO) & (patches >= BIASED_PATCH_SHARE)
        if not all(0 <= head < n_heads for head in self.heads):
            raise CaptError(f"heads: {self.heads}, but the pooling row has {n_heads} heads, 0 to {n_heads - 1}")
        chosen = torch.zeros(n_heads, dtype=torch.bool, device=before.device)
        chosen[list(self.heads)] = True
        return chosen

    def record(self) -> dict[str, Any]:
        """JSON-able, with digests in place of tensors."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        digests = {k: strong_digest([(k, v)]) for k, v in own.items() if isinstance(v, Tensor)}
        return {"rule": type(self).__name__, **own, **digests}


@dataclass(frozen=True)
class RadialBias(Redistribution):
    """R1: each patch's weight times ``exp(strength * g(radius))``; negative strengths pull inwards.

    ``shape``: g is the radius, its square, the square radius, or 1 outside the square of half the side.
    """

    strength: float = 1.0
    shape: RadialShape = "r"

    @property
    def neutral(self) -> bool:
        """Whether the strength is 0."""
        return self.strength == 0

    def bias(self, grid: tuple[int, int]) -> Tensor:
        """[1, N]."""
        at = patch_positions(grid)
        shapes = {
            "r": at.radius,
            "r2": at.radius.square(),
            "square": at.square_radius,
            "step": (at.square_radius > 0.5 + 1e-6).float(),
        }
        if self.shape not in shapes:
            raise CaptError(f"shape: one of {', '.join(shapes)}, found {self.shape!r}")
        return self.strength * shapes[self.shape][None]


@dataclass(frozen=True)
class MassTransfer(Redistribution):
    """R2: the share ``moved_share`` of the donors' weight goes to the receivers, in proportion to what they have.

    Groups are named by their beginnings: ``("center",)`` to ``("off",)``, or with sinks told apart
    ``("center sink", "off sink")`` to ``("off",)``; a donor never receives. Nothing moves where there is no receiver.
    """

    moved_share: float = 0.6
    donors: tuple[str, ...] = ("center",)
    receivers: tuple[str, ...] = ("off",)

    def __post_init__(self) -> None:
        if not 0 <= self.moved_share <= 1:
            raise CaptError(f"moved_share: expected a part of 1, found {self.moved_share}")

    @property
    def neutral(self) -> bool:
        """Whether nothing is moved."""
        return self.moved_share == 0

    def moved(self, shares: Tensor, groups: KeyGroups) -> Tensor:
        """[..., G]."""
        giving = groups.starting_with(*self.donors)
        taking = groups.starting_with(*self.receivers) & ~giving
        if not giving.any() or not taking.any():
            raise CaptError(
                f"mass transfer from {self.donors} to {self.receivers}: the groups are {groups.names}; name the "
                "beginning of at least one for each side"
            )
        there = (shares * taking).sum(-1, keepdim=True)
        moved = self.moved_share * (shares * giving).sum(-1, keepdim=True)
        can = there > 0
        given = torch.where(can & giving, shares * (1 - self.moved_share), shares)
        return torch.where(can & taking, given * (1 + moved / there.masked_fill(~can, 1.0)), given)


@dataclass(frozen=True)
class Temperature(Redistribution):
    """R3: patch scores times ``alpha``; below 1 flattens. Meant for ``keep_prefix=True``.

    Source: AdaptVis (arXiv 2503.01773) for language decoders; on a pooling row ours.
    """

    alpha: float = 0.8

    @property
    def neutral(self) -> bool:
        """Whether alpha is 1."""
        return self.alpha == 1

    @property
    def temperature(self) -> float:
        """Alpha."""
        return self.alpha


@dataclass(frozen=True)
class PriorCancellation(Redistribution):
    """R4: weights divided by the power ``kappa`` of what the position gets on average, whatever the picture.

    ``prior``: float [H, N] or [1, N], mean weights of the patches over any images (:func:`attention_prior`).
    """

    prior: Tensor
    kappa: float = 0.5

    @property
    def neutral(self) -> bool:
        """Whether kappa is 0."""
        return self.kappa == 0

    def bias(self, grid: tuple[int, int]) -> Tensor:
        """[H or 1, N]."""
        if self.prior.ndim != 2 or self.prior.shape[1] != grid[0] * grid[1]:
            raise CaptError(
                f"prior: expected [heads or 1, {grid[0] * grid[1]}] for a {grid[0]} x {grid[1]} grid, found "
                f"{list(self.prior.shape)}; measure it on this tower with attention_prior"
            )
        prior = self.prior.clamp_min(1e-30)
        return -self.kappa * (prior / prior.mean(-1, keepdim=True)).log()


@dataclass(frozen=True)
class RegionBoost(Redistribution):
    """R5: weights in the region times ``exp(strength)``; infinity leaves nothing outside. Needs region groups."""

    strength: float = math.log(100.0)

    @property
    def neutral(self) -> bool:
        """Whether the strength is 0."""
        return self.strength == 0

    def moved(self, shares: Tensor, groups: KeyGroups) -> Tensor:
        """[..., G], normalised."""
        region = groups.starting_with("region")
        if not region.any():
            raise CaptError(f"region boost: needs groups of a region, found {groups.names}")
        if self.strength == math.inf:
            return region.to(shares).expand_as(shares)
        # A boost of the region is written as damping of the others, which cannot overflow.
        boosted = shares * torch.where(region, math.exp(min(self.strength, 0.0)), math.exp(-max(self.strength, 0.0)))
        return _normalised(boosted)


@dataclass(frozen=True)
class UniformMixture(Redistribution):
    """R6: the part ``part`` of the patches' weight is spread evenly over the receivers."""

    part: float = 0.3
    receivers: tuple[str, ...] = ("off",)

    def __post_init__(self) -> None:
        if not 0 <= self.part <= 1:
            raise CaptError(f"part: expected a part of 1, found {self.part}")

    @property
    def neutral(self) -> bool:
        """Whether nothing is spread."""
        return self.part == 0

    @property
    def mixture(self) -> tuple[float, tuple[str, ...]]:
        """Part and receivers."""
        return self.part, self.receivers


def _normalised(shares: Tensor) -> Tensor:
    """Shares [..., G] with sum 1; all 0 where nothing is left to share, as when a prefix takes everything."""
    total = shares.sum(-1, keepdim=True)
    return shares / total.masked_fill(total == 0, 1.0)
