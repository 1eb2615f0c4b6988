"""Sample Confusion Miner (SAM): stored mistakes of the mined pairs, seen through the Diff-Manner Adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt.bank import ConfusionBank
from capt.modules.diff_manner_adapter import DiffMannerAdapter
from capt.modules.semantic_confusion_miner import SemanticConfusion

if TYPE_CHECKING:
    from capt.backbones import TokenTower


@dataclass(frozen=True)
class SampleConfusion:
    """What SAM found for a batch; R = k * m representatives an image.

    Attributes:
        guidance: float [B, d], the sample confusion guidance.
        own: float [B, d], unit norm, the query through the adapter.
        representatives: float [B, R, d], unit norm, the stored mistakes through the adapter; zeros where masked.
        mask: bool [B, R], true where a representative exists.
        rows: int64 [B, R], bank rows, -1 where none.
        similarities: float32 [B, R], -inf where none.
    """

    guidance: Tensor
    own: Tensor
    representatives: Tensor
    mask: Tensor
    rows: Tensor
    similarities: Tensor


class SampleConfusionMiner(nn.Module):
    """Retrieve the most similar stored mistakes of every mined pair and encode them with the adapted tower.

    Guidance is a softmax over the representatives, weighted by their similarity to the image; an image with none
    (empty bank, novel classes, bank switched off) is guided by its own adapted feature.

    Source: CAPT, SAM; excluding the query's own id, masking and the pooling temperature: ours.
    """

    def __init__(self, adapter: DiffMannerAdapter, m: int = 1, temperature: float = 10.0) -> None:
        """``m`` representatives a pair; ``temperature`` multiplies cosine similarities before the softmax."""
        super().__init__()
        self.adapter, self.m, self.temperature = adapter, m, temperature

    def retrieve(
        self, bank: ConfusionBank, features: Tensor, semantic: SemanticConfusion, sample_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Similarities float32 [B, R] and bank rows int64 [B, R] of the representatives; no gradient.

        ``sample_ids`` int64 [B]: each image's own id, which is never returned.
        """
        with torch.no_grad():
            similarities, rows = bank.search(
                features.detach(), semantic.pseudo, semantic.confusing, m=self.m, exclude=sample_ids
            )
        return similarities.flatten(1), rows.flatten(1)

    def forward(
        self,
        features: Tensor,
        tokens: Tensor,
        tower: TokenTower,
        semantic: SemanticConfusion,
        *,
        bank: ConfusionBank | None = None,
        bank_tokens: Callable[[Tensor], Tensor] | None = None,
        sample_ids: Tensor | None = None,
    ) -> SampleConfusion:
        """Mine a batch.

        Args:
            features: float [B, d], unit norm, base features of the images.
            tokens: float [B, L, D], :meth:`DiffMannerAdapter.frozen_tokens` of the images.
            tower: the image tower.
            semantic: result of the Semantic Confusion Miner.
            bank: where to look; None: no representatives.
            bank_tokens: bank rows int64 [n] -> frozen tokens [n, L, D] of those stored images.
            sample_ids: int64 [B], own ids to exclude.
        """
        batch = len(features)
        if bank is None or bank_tokens is None or not len(bank) or not semantic.confusing.shape[1]:
            own = F.normalize(
                self.adapter.encode(tower, tokens, self.adapter.intensity(features.new_zeros(batch))), dim=-1
            )
            nothing = torch.zeros(batch, 0, device=features.device)
            return SampleConfusion(
                own, own, own.new_zeros(batch, 0, own.shape[1]), nothing.bool(), nothing.long(), nothing
            )
        similarities, rows = self.retrieve(bank, features, semantic, sample_ids)
        mask = rows >= 0
        best = torch.where(mask, similarities, 0.0).amax(1)
        own = F.normalize(self.adapter.encode(tower, tokens, self.adapter.intensity(best)), dim=-1)
        representatives = own.new_zeros(*rows.shape, own.shape[1])
        if bool(mask.any()):
            encoded = self._encode_rows(tower, rows[mask], similarities[mask], bank_tokens)
            representatives = representatives.masked_scatter(mask.unsqueeze(-1), encoded.to(representatives.dtype))
        guidance = self._pool(features, own, representatives, mask)
        return SampleConfusion(guidance, own, representatives, mask, rows, similarities)

    def _encode_rows(
        self, tower: TokenTower, rows: Tensor, similarities: Tensor, bank_tokens: Callable[[Tensor], Tensor]
    ) -> Tensor:
        if self.adapter.dynamic:
            return F.normalize(
                self.adapter.encode(tower, bank_tokens(rows), self.adapter.intensity(similarities)), dim=-1
            )
        # With a constant mixing weight a row looks the same to every query: encode each once.
        distinct, inverse = torch.unique(rows, return_inverse=True)
        return F.normalize(self.adapter.encode(tower, bank_tokens(distinct)), dim=-1)[inverse]

    def _pool(self, features: Tensor, own: Tensor, representatives: Tensor, mask: Tensor) -> Tensor:
        scores = self.temperature * torch.einsum("bd,brd->br", features, representatives)
        empty = ~mask.any(1, keepdim=True)
        weights = scores.masked_fill(~mask & ~empty, float("-inf")).softmax(1)
        return torch.where(empty, own, torch.einsum("br,brd->bd", weights, representatives))

    def extra_repr(self) -> str:
        return f"m={self.m}, temperature={self.temperature}"
