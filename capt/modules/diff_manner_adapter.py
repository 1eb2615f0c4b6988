"""Diff-Manner Adapter: a depth-wise 3x3 convolution beside frozen attention, on the patch grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from capt.errors import CaptError
from capt.ops import grid_adapter

if TYPE_CHECKING:
    from capt.backbones import TokenTower
    from capt.backbones.base import TokenBlock

Placement = Literal["after", "before"]
Manner = Literal["both", "local", "global", "none"]


class DiffMannerAdapter(nn.Module):
    """Local-wise manner of the adapter: ``X <- X + alpha * DWConv3x3(X)`` on patch tokens, zero-initialised.

    In a vision transformer X is a block's stream after its frozen attention (the global-wise manner); in a tower
    without blocks it is the final token grid. Kernels start at zero, so the adapted tower equals the frozen one.

    Attributes:
        weight: float32 [n_layers, width, 3, 3].
        hidden_weight: float32 [n_layers, hidden, 3, 3], of the feed-forward part; None without.

    Source: CAPT, Diff-Manner Adapter (attention, then convolution); zero initialisation and places: ours. Placement
    ``before`` and the second convolution: LwEIB, whose adapter the published code carries.
    """

    def __init__(
        self, width: int, n_layers: int = 1, *, alpha: float = 1.0, dynamic: bool = False, scale: float = 5.0,
        gamma: float = 0.5, placement: Placement = "after", hidden: int | None = None, manner: Manner = "both",
    ) -> None:  # fmt: skip
        """Create ``n_layers`` kernels.

        Args:
            width: token width D.
            n_layers: adapted blocks, counted from the last one.
            alpha: constant mixing weight.
            dynamic: use ``alpha = scale * c ** gamma`` with confusion intensity c in [0, 1] instead.
            placement: ``after``: on the stream after attention; ``before``: ``x + MHSA(u + alpha * conv(u))``,
                ``u = LN(x)``.
            hidden: width of the blocks' hidden feed-forward layer, which then gets a convolution of its own in front
                of the activation.
            manner: which manners an adapted block has. ``local``: the convolution without the attention; ``global``
                and ``none``: the frozen attention without the convolution, which is the frozen tower.
        """
        super().__init__()
        if width < 1 or n_layers < 1:
            raise CaptError(f"DiffMannerAdapter: width and n_layers must be positive, found {width} and {n_layers}")
        if placement not in get_args(Placement) or manner not in get_args(Manner):
            raise CaptError(
                f"DiffMannerAdapter: placement is one of {', '.join(get_args(Placement))}, manner one of "
                f"{', '.join(get_args(Manner))}; found {placement!r} and {manner!r}"
            )
        if manner == "local" and placement == "before":
            raise CaptError(
                "DiffMannerAdapter: manner 'local' leaves the attention out, so nothing can be placed before it; "
                "use placement 'after'"
            )
        self.alpha, self.dynamic, self.scale, self.gamma = alpha, dynamic, scale, gamma
        self.placement, self.manner = placement, manner
        self.weight = nn.Parameter(torch.zeros(n_layers, width, 3, 3))
        self.hidden_weight = nn.Parameter(torch.zeros(n_layers, hidden, 3, 3)) if hidden else None

    @classmethod
    def for_tower(
        cls, tower: TokenTower, *, layers: str | int = "all", mlp: bool = False, **options: Any
    ) -> DiffMannerAdapter:
        """An adapter that fits ``tower``.

        Args:
            tower: image tower of a wrapped backbone.
            layers: ``"all"`` blocks, ``"last"``, or a number of last blocks; towers without blocks have one place.
                ``"last"`` is the last block whose adapted patches still reach the pooled feature: where a CLS token
                is pooled that is the last but one, because no attention follows the last block's adapter.
            mlp: a second convolution in every adapted block's feed-forward part.
            options: see :meth:`__init__`.

        Raises:
            CaptError: the tower has no such block, or its blocks cannot be entered where the adapter shall stand.
        """
        places = max(len(tower.blocks), 1)
        last = min(2 if tower.n_prefix else 1, places)
        n_layers = {"all": places, "last": last}.get(layers, layers) if isinstance(layers, str) else layers
        if not isinstance(n_layers, int) or not 1 <= n_layers <= places:
            raise CaptError(f"layers must be 'all', 'last' or a number from 1 to {places}, found {layers!r}")
        before = options.get("placement") == "before"
        if (before or mlp) and not tower.blocks:
            raise CaptError(
                "adapter: this tower has no transformer blocks, so a convolution can only stand after it; "
                "use placement 'after' and no second convolution"
            )
        adapted = tower.blocks[places - n_layers :] if tower.blocks else ()
        hidden = [block.feed_forward_weights() for block in adapted] if mlp else []
        for block in adapted:
            inner = block.inner()
            if (before and (inner is None or inner.norm is None)) or (mlp and (inner is None or inner.hidden is None)):
                where = "in front of the attention" if before else "in the feed-forward part"
                raise CaptError(
                    f"adapter: the blocks of this tower ({type(block).__name__}) cannot be entered {where}; "
                    "use placement 'after' and no second convolution"
                )
        if any(weights is None for weights in hidden):
            raise CaptError("adapter: the feed-forward part of this tower has no plain hidden layer to adapt")
        n_hidden = hidden[0].w_in.shape[0] if hidden and hidden[0] is not None else None
        return cls(tower.width, n_layers, hidden=n_hidden, **options)

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

    @property
    def rests_frozen(self) -> bool:
        """With zero kernels the adapted tower is the frozen one."""
        return self.manner != "local"

    def frozen_tokens(self, tower: TokenTower, images: Tensor) -> Tensor:
        """Tokens [B, L, D] at the input of the first adapted block; nothing before it learns, so they may be cached."""
        tokens = tower.embed(images)
        for block in tower.blocks[: max(len(tower.blocks) - len(self.weight), 0)]:
            tokens = block.feed_forward(block.attend(tokens))
        return tokens

    def encode(self, tower: TokenTower, tokens: Tensor, alpha: Tensor | float | None = None) -> Tensor:
        """Image features [B, d] (not normalised) of :meth:`frozen_tokens`, with the adapter in every adapted place."""
        if self.manner in ("global", "none"):
            return self.encode_frozen(tower, tokens)
        options = {"grid": tower.grid, "n_prefix": tower.n_prefix, "alpha": self.alpha if alpha is None else alpha}
        if not tower.blocks:
            return tower.project(self(tokens, 0, **options))
        first = len(tower.blocks) - len(self.weight)
        for layer, block in enumerate(tower.blocks[first:]):
            tokens = self._block(block, layer, tokens, options)
        return tower.project(tokens)

    def _block(self, block: TokenBlock, layer: int, tokens: Tensor, options: dict[str, Any]) -> Tensor:
        def conv(x: Tensor) -> Tensor:
            return self.forward(x, layer, **options)

        def hidden_conv(x: Tensor) -> Tensor:
            assert self.hidden_weight is not None
            return grid_adapter(x, self.hidden_weight[layer].to(x.dtype), **options)

        inner = block.inner()
        if self.placement == "before":
            assert inner is not None and inner.norm is not None
            with _changed(inner.norm, conv, inner.sequence_first):
                tokens = block.attend(tokens)
        else:
            tokens = conv(tokens if self.manner == "local" else block.attend(tokens))
        with ExitStack() as stack:
            if self.hidden_weight is not None:
                assert inner is not None and inner.hidden is not None
                stack.enter_context(_changed(inner.hidden, hidden_conv))
            return block.feed_forward(tokens)

    def encode_frozen(self, tower: TokenTower, tokens: Tensor) -> Tensor:
        """Image features [B, d] (not normalised) of :meth:`frozen_tokens`, by the untouched tower."""
        for block in tower.blocks[len(tower.blocks) - len(self.weight) :] if tower.blocks else ():
            tokens = block.feed_forward(block.attend(tokens))
        return tower.project(tokens)

    def extra_repr(self) -> str:
        n_layers, width = self.weight.shape[:2]
        return (
            f"width={width}, n_layers={n_layers}, alpha={'dynamic' if self.dynamic else self.alpha}, "
            f"placement={self.placement}, manner={self.manner}, mlp={self.hidden_weight is not None}"
        )


@contextmanager
def _changed(module: nn.Module, change: Callable[[Tensor], Tensor], sequence_first: bool = False) -> Iterator[None]:
    """Let a frozen module return ``change`` of what it returns, [B, L, D] (or [L, B, D], turned for ``change``)."""

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return change(output.transpose(0, 1)).transpose(0, 1) if sequence_first else change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
