"""Lookups in a Confusion Bank, on the device of the query and without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from capt.ops import bank_topk

Retrieval = Literal["similar", "random"]


@dataclass(frozen=True)
class BankIndex:
    """A bank's tensors on one device: everything a lookup reads.

    Attributes:
        features: float [M, d], unit norm.
        labels, predictions, sample_ids: int64 [M].
        cell_keys, cell_starts, cell_stops: int64 [n_cells], ``prediction * C + label`` ascending, and row ranges.
        column_starts, column_stops: int64 [C], row ranges of the predicted classes.
        ids_sorted, rows_by_id: int64 [M], rows by sample id.
    """

    features: Tensor
    labels: Tensor
    predictions: Tensor
    sample_ids: Tensor
    cell_keys: Tensor
    cell_starts: Tensor
    cell_stops: Tensor
    column_starts: Tensor
    column_stops: Tensor
    ids_sorted: Tensor
    rows_by_id: Tensor

    def pair_ranges(self, pseudo: Tensor, confusing: Tensor, exclude: Tensor | None = None) -> Tensor:
        """See :meth:`capt.bank.ConfusionBank.pair_ranges`."""
        p = pseudo.unsqueeze(1).expand_as(confusing)
        ranges = torch.stack([self._cell_range(confusing, p), self._cell_range(p, confusing)], 2)
        available = ranges.diff(dim=-1).sum((2, 3))
        if exclude is not None and len(self.labels):
            row = self._row_of(exclude)[:, None, None]
            available = available - ((ranges[..., 0] <= row) & (row < ranges[..., 1])).sum(2)
        column = torch.stack([self.column_starts[p], self.column_stops[p]], -1)
        fallback = torch.stack([column, torch.zeros_like(column)], 2)
        return torch.where((available > 0)[..., None, None], ranges, fallback)

    def search(
        self, queries: Tensor, pseudo: Tensor, confusing: Tensor, m: int, exclude: Tensor | None, retrieval: Retrieval,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See :meth:`capt.bank.ConfusionBank.search`."""
        ranges = self.pair_ranges(pseudo, confusing, exclude)
        ids = None if exclude is None else self.sample_ids
        if retrieval == "similar" or not len(self.labels):
            return bank_topk(queries, self.features, k=m, ranges=ranges, row_ids=ids, exclude=exclude)
        # Directions drawn anew are exchangeable: whatever the query, each candidate is the best with equal chance.
        asked, offered = (
            torch.randn(n, 8, generator=generator, device=queries.device) for n in (len(queries), len(self.labels))
        )
        _, rows = bank_topk(asked, offered, k=m, ranges=ranges, row_ids=ids, exclude=exclude)
        similarities = torch.einsum("bd,bkmd->bkm", queries, self.features[rows.clamp_min(0)]).float()
        return similarities.masked_fill(rows < 0, float("-inf")), rows

    def _cell_range(self, labels: Tensor, predictions: Tensor) -> Tensor:
        """Row range [..., 2] of the cells (label, prediction); empty cells give (0, 0)."""
        keys = predictions * len(self.column_starts) + labels
        if not len(self.cell_keys):
            return torch.zeros(*keys.shape, 2, dtype=torch.long, device=keys.device)
        position = torch.searchsorted(self.cell_keys, keys).clamp_max(len(self.cell_keys) - 1)
        found = self.cell_keys[position] == keys
        rows = torch.stack([self.cell_starts[position], self.cell_stops[position]], -1)
        return torch.where(found.unsqueeze(-1), rows, 0)

    def _row_of(self, ids: Tensor) -> Tensor:
        """Row of each sample id, -1 where the bank does not hold it."""
        position = torch.searchsorted(self.ids_sorted, ids).clamp_max(len(self.ids_sorted) - 1)
        return torch.where(self.ids_sorted[position] == ids, self.rows_by_id[position], -1)
