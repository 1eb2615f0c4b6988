"""Diff-Manner Adapter: a depth-wise 3x3 convolution beside frozen attention, on the patch grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from capt.errors import CaptError
from capt.ops import grid_adapter

if TYPE_CHECKING:
    from capt.backbones import TokenTower


class DiffMannerAdapter(nn.Module):
    """Local-wise manner of the adapter: ``X <- X + alpha * DWConv3x3(X)`` on patch tokens, zero-initialised.

    In a vision transformer X is a block's stream after its frozen attention (the global-wise manner); in a tower
    without blocks it is the final token grid. Kernels start at zero, so the adapted tower equals the frozen one.

    Attributes:
        weight: float32 [n_layers, width, 3, 3].

    Source: CAPT, Diff-Manner Adapter (attention, then convolution); zero initialisation and placement: ours.
    """

    def __init__(
        self, width: int, n_layers: int = 1, *, alpha: float = 1.0, dynamic: bool = False, scale: float = 5.0,
        gamma: float = 0.5,
    ) -> None:  # fmt: skip
        """Create ``n_layers`` kernels.

        Args:
            width: token width D.
            n_layers: adapted blocks, counted from the last one.
            alpha: constant mixing weight.
            dynamic: use ``alpha = scale * c ** gamma`` with confusion intensity c in [0, 1] instead.
        """
        super().__init__()
        if width < 1 or n_layers < 1:
            raise CaptError(f"DiffMannerAdapter: width and n_layers must be positive, found {width} and {n_layers}")
        self.alpha, self.dynamic, self.scale, self.gamma = alpha, dynamic, scale, gamma
        self.weight = nn.Parameter(torch.zeros(n_layers, width, 3, 3))

    @classmethod
    def for_tower(cls, tower: TokenTower, *, layers: str | int = "all", **options: float | bool) -> DiffMannerAdapter:
        """An adapter that fits ``tower``.

        Args:
            tower: image tower of a wrapped backbone.
            layers: ``"all"`` blocks, ``"last"``, or a number of last blocks; towers without blocks have one place.
                ``"last"`` is the last block whose adapted patches still reach the pooled feature: where a CLS token
                is pooled that is the last but one, because no attention follows the last block's adapter.
        """
        places = max(len(tower.blocks), 1)
        last = min(2 if tower.n_prefix else 1, places)
        n_layers = {"all": places, "last": last}.get(layers, layers) if isinstance(layers, str) else layers
        if not isinstance(n_layers, int) or not 1 <= n_layers <= places:
            raise CaptError(f"layers must be 'all', 'last' or a number from 1 to {places}, found {layers!r}")
        return cls(tower.width, n_layers, **options)  # type: ignore[arg-type]

    def intensity(self, similarity: Tensor) -> Tensor | float:
        """Mixing weight for confusion intensities: float [B] cosine similarities (clamped at 0), or the constant."""
        if not self.dynamic:
            return self.alpha
        # The square root has an infinite slope at 0; a floor of 1e-12 keeps value and gradient finite.
        return self.scale * similarity.clamp(1e-12, 1.0) ** self.gamma

    def forward(
        self,
        tokens: Tensor,
        layer: int = 0,
        *,
        grid: tuple[int, int],
        n_prefix: int = 0,
        alpha: Tensor | float | None = None,
    ) -> Tensor:
        """Adapt tokens.

        Args:
            tokens: float [B, n_prefix + H * W, D]; the prefix (CLS, registers) passes unchanged.
            layer: which kernel.
            grid: (H, W).
            alpha: overrides the constant; scalar or [B].
        """
        weight = self.weight[layer].to(tokens.dtype)
        return grid_adapter(tokens, weight, alpha=self.alpha if alpha is None else alpha, grid=grid, n_prefix=n_prefix)

    # ---- towers -------------------------------------------------------------------------------------

    def frozen_tokens(self, tower: TokenTower, images: Tensor) -> Tensor:
        """Tokens [B, L, D] at the input of the first adapted block; nothing before it learns, so they may be cached."""
        tokens = tower.embed(images)
        for block in tower.blocks[: max(len(tower.blocks) - len(self.weight), 0)]:
            tokens = block.feed_forward(block.attend(tokens))
        return tokens

    def encode(self, tower: TokenTower, tokens: Tensor, alpha: Tensor | float | None = None) -> Tensor:
        """Image features [B, d] (not normalised) of :meth:`frozen_tokens`, with the adapter in every adapted place."""
        options = {"grid": tower.grid, "n_prefix": tower.n_prefix, "alpha": alpha}
        if not tower.blocks:
            return tower.project(self(tokens, 0, **options))
        first = len(tower.blocks) - len(self.weight)
        for layer, block in enumerate(tower.blocks[first:]):
            tokens = block.feed_forward(self(block.attend(tokens), layer, **options))
        return tower.project(tokens)

    def encode_frozen(self, tower: TokenTower, tokens: Tensor) -> Tensor:
        """Image features [B, d] (not normalised) of :meth:`frozen_tokens`, by the untouched tower."""
        for block in tower.blocks[len(tower.blocks) - len(self.weight) :] if tower.blocks else ():
            tokens = block.feed_forward(block.attend(tokens))
        return tower.project(tokens)

    def extra_repr(self) -> str:
        n_layers, width = self.weight.shape[:2]
        return f"width={width}, n_layers={n_layers}, alpha={'dynamic' if self.dynamic else self.alpha}"
