"""Frozen tokens of a fixed set of images: computed once where they fit, on demand where they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from capt.errors import CaptError

if TYPE_CHECKING:
    from capt.data.image_set import Images


class TokenStore:
    """Tokens by image position, for one transform.

    Everything in front of the first adapted block is frozen, so its output may be stored. Above ``limit`` bytes
    nothing is stored and each request runs the images through the tower again: same values, more time.
    """

    def __init__(
        self,
        images: Images,
        transform: Callable[..., Tensor],
        encode: Callable[[Tensor], Tensor],
        *,
        batch_size: int = 32,
        limit: int = 2 << 30,
        seed: int | None = None,
        device: torch.device | str = "cpu",
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Prepare a store; nothing is computed before the first request.

        Args:
            images: the images; positions index them.
            transform: PIL image -> float [3, H, W].
            encode: float [B, 3, H, W] -> tokens [B, L, D], frozen.
            limit: bytes of tokens to keep.
            seed: of a random transform, which must accept ``generator=``; image i always gets the same draw.
            progress: called with the number of images just encoded.
        """
        self.images, self.transform, self.encode = images, transform, encode
        self.batch_size, self.limit, self.seed, self.device = batch_size, limit, seed, torch.device(device)
        self.progress = progress
        self._tokens: Tensor | None = None
        self._stored: bool | None = None  # not decided yet

    def __len__(self) -> int:
        return len(self.images)

    def __call__(self, positions: Tensor) -> Tensor:
        """Tokens [n, L, D] of int64 [n] positions."""
        if self._stored is None:
            self._stored = self._fill()
        if self._tokens is not None:
            # A copy that the host does not wait for; tokens and their index live on the device.
            return self._tokens[positions.to(self._tokens.device, non_blocking=True)].to(self.device)
        return self._compute(positions)

    def _compute(self, positions: Tensor) -> Tensor:
        chunks = []
        with torch.no_grad():
            for chunk in positions.split(self.batch_size):
                pixels = torch.stack([self._pixels(int(i)) for i in chunk])
                chunks.append(self.encode(pixels.to(self.device)))
                if self.progress:
                    self.progress(len(chunk))
        return torch.cat(chunks)

    def _pixels(self, position: int) -> Tensor:
        options: dict[str, Any] = {}
        if self.seed is not None:
            # Keyed by the image's id, so that the draw does not depend on which other images are in the set.
            mixed = (int(self.images.ids[position]) * 1_000_003 + self.seed) % (1 << 62)
            options["generator"] = torch.Generator().manual_seed(mixed)
        return self.transform(self.images.image(position), **options)

    def _fill(self) -> bool:
        """Encode everything if it fits; true if it did."""
        if not len(self.images):
            raise CaptError("TokenStore: there are no images to encode")
        first = self._compute(torch.arange(min(self.batch_size, len(self.images))))
        if first[0].nbytes * len(self.images) > self.limit:
            return False
        rest = torch.arange(len(first), len(self.images))
        self._tokens = torch.cat([first, self._compute(rest)]) if len(rest) else first
        return True
