"""Sample Confusion Miner (SAM): stored mistakes of the mined pairs, seen through the Diff-Manner Adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt.bank import ConfusionBank
from capt.bank.search import Retrieval
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

    @staticmethod
    def absent(own: Tensor) -> SampleConfusion:
        """No representatives: images are guided by their own features float [B, d]."""
        nothing = torch.zeros(len(own), 0, device=own.device)
        return SampleConfusion(
            own, own, own.new_zeros(len(own), 0, own.shape[1]), nothing.bool(), nothing.long(), nothing
        )


class SampleConfusionMiner(nn.Module):
    """Retrieve the most similar stored mistakes of every mined pair and encode them with the adapted tower.

    Guidance is a softmax over the representatives, weighted by their similarity to the image; an image with none
    (empty bank, novel classes, bank switched off) is guided by its own adapted feature.

    Source: CAPT, SAM; excluding the query's own id, masking and the pooling temperature: ours.
    """

    def __init__(
        self, adapter: DiffMannerAdapter, m: int = 1, temperature: float = 10.0, retrieval: Retrieval = "similar"
    ) -> None:
        """``m`` representatives a pair; ``temperature`` multiplies cosine similarities before the softmax.

        ``retrieval="random"``, a control, draws them: by torch's generator in training, always alike in evaluation.
        """
        super().__init__()
        self.adapter, self.m, self.temperature, self.retrieval = adapter, m, temperature, retrieval

    def retrieve(
        self, bank: ConfusionBank, features: Tensor, semantic: SemanticConfusion, sample_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Similarities float32 [B, R] and bank rows int64 [B, R] of the representatives; no gradient.

        ``sample_ids`` int64 [B]: each image's own id, which is never returned.
        """
        fixed = self.retrieval == "random" and not self.training
        with torch.no_grad():
            similarities, rows = bank.search(
                features.detach(), semantic.pseudo, semantic.confusing, m=self.m, exclude=sample_ids,
                retrieval=self.retrieval,
                generator=torch.Generator(features.device).manual_seed(0) if fixed else None,
            )  # fmt: skip
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
            return SampleConfusion.absent(own)
        similarities, rows = self.retrieve(bank, features, semantic, sample_ids)
        mask = rows >= 0
        best = torch.where(mask, similarities, 0.0).amax(1)
        own = F.normalize(self.adapter.encode(tower, tokens, self.adapter.intensity(best)), dim=-1)
        representatives = self._encode_rows(tower, rows, similarities, len(bank), bank_tokens)
        representatives = torch.where(mask.unsqueeze(-1), representatives, 0.0)
        guidance = self._pool(features, own, representatives, mask)
        return SampleConfusion(guidance, own, representatives, mask, rows, similarities)

    def _encode_rows(
        self,
        tower: TokenTower,
        rows: Tensor,
        similarities: Tensor,
        n_rows: int,
        bank_tokens: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Unit-norm features [B, R, d] of bank rows [B, R]; something finite where there is none.

        Which rows there are is known on the device alone, and asking would wait for it: absent ones stand for row 0.
        """
        if not self.adapter.dynamic and n_rows <= rows.numel():
            # With a constant mixing weight a row looks the same to every query: encode the whole bank once.
            everything = self.adapter.encode(tower, bank_tokens(torch.arange(n_rows, device=rows.device)))
            return F.normalize(everything, dim=-1)[rows.clamp_min(0)]
        tokens = bank_tokens(rows.clamp_min(0).flatten())
        encoded = self.adapter.encode(tower, tokens, self.adapter.intensity(similarities.flatten()))
        return F.normalize(encoded, dim=-1).view(*rows.shape, -1)

    def _pool(self, features: Tensor, own: Tensor, representatives: Tensor, mask: Tensor) -> Tensor:
        scores = self.temperature * torch.einsum("bd,brd->br", features, representatives)
        empty = ~mask.any(1, keepdim=True)
        weights = scores.masked_fill(~mask & ~empty, float("-inf")).softmax(1)
        return torch.where(empty, own, torch.einsum("br,brd->bd", weights, representatives))

    def extra_repr(self) -> str:
        return f"m={self.m}, temperature={self.temperature}, retrieval={self.retrieval}"
