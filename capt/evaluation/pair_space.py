"""The candidate (state, object) pairs of a closed or open world."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from capt.errors import CaptError, DataError, NumericError
from capt.ops._checks import check_count, check_tensor


@dataclass(frozen=True, eq=False)
class PairSpace:
    """Candidate pairs of one world, in a fixed order; equal scores go to the earlier pair.

    Attributes:
        pairs: int64 [K, 2], (state, object) of each candidate; no pair occurs twice.
        seen: bool [K], whether the training split has the pair.
        n_states, n_objects: sizes of the two vocabularies.
        feasibility: float32 [K] of the unseen pairs, or None. What it holds for seen pairs is never used.

    Raises:
        CaptError: shapes or types are wrong.
        DataError: no pair, a pair twice, a state or object that does not exist.
        NumericError: a feasibility is NaN.
    """

    pairs: Tensor
    seen: Tensor
    n_states: int
    n_objects: int
    feasibility: Tensor | None = None

    def __post_init__(self) -> None:
        self._check_pairs("pairs", self.pairs)
        check_tensor("PairSpace", "seen", self.seen, (len(self),))
        if self.seen.dtype != torch.bool:
            raise CaptError(f"PairSpace: seen must be bool, found {self.seen.dtype}")
        if not len(self):
            raise DataError("PairSpace: there is no pair to choose from; a world needs at least one candidate")
        keys, order = self._sorted_keys
        again = (keys[1:] == keys[:-1]).nonzero().flatten()
        if len(again):
            first, second = sorted(order[again[0] : again[0] + 2].tolist())
            both = "; once as seen and once as unseen" if self.seen[first] != self.seen[second] else ""
            pair = tuple(self.pairs[first].tolist())
            raise DataError(f"PairSpace: pair {pair} occurs twice, at {first} and {second}{both}: list it once")
        if self.feasibility is not None:
            check_tensor("PairSpace", "feasibility", self.feasibility, (len(self),))
            if self.feasibility[~self.seen].isnan().any():
                raise NumericError("PairSpace: feasibility of an unseen pair is NaN; were all its vectors finite?")

    def __len__(self) -> int:
        return len(self.pairs)

    @classmethod
    def closed_world(cls, pairs: Any, seen: Any, split: Any, *, n_states: int, n_objects: int) -> PairSpace:
        """Seen pairs and those of one split, in the order of ``pairs``.

        pairs int [P, 2] of all splits; seen bool [P]; split int [M]: positions in ``pairs`` that the evaluated split
        lists (not empty). Unseen pairs of other splits are no candidates.
        """
        pairs, seen, split = torch.as_tensor(pairs), torch.as_tensor(seen), torch.as_tensor(split)
        if not split.numel():
            raise DataError("PairSpace: the split lists no pair, so there is nothing to evaluate")
        wrong = split[(split < 0) | (split >= len(pairs))]
        if len(wrong):
            raise DataError(f"PairSpace: the split lists pair {int(wrong[0])}, but there are only {len(pairs)} pairs")
        kept = seen.clone()
        kept[split] = True
        return cls(pairs[kept], seen[kept], n_states, n_objects)

    @classmethod
    def open_world(cls, n_states: int, n_objects: int, seen_pairs: Any, feasibility: Tensor | None = None) -> PairSpace:
        """Every state with every object, at position state * n_objects + object.

        seen_pairs int [M, 2]; feasibility float32 [n_states, n_objects], see :func:`capt.evaluation.feasibility`.
        """
        if feasibility is not None:
            check_tensor("PairSpace", "feasibility", feasibility, (n_states, n_objects))
            feasibility = feasibility.flatten()
        seen_pairs = torch.as_tensor(seen_pairs)
        pairs = torch.cartesian_prod(torch.arange(n_states), torch.arange(n_objects))
        every = cls(pairs, torch.zeros(len(pairs), dtype=torch.bool), n_states, n_objects)
        seen = every.seen.clone()
        seen[every.position(seen_pairs)] = True
        return cls(pairs, seen, n_states, n_objects, feasibility)

    def position(self, pairs: Tensor) -> Tensor:
        """Position of each pair int64 [N, 2] in this space, int64 [N]; -1 for a pair that is no candidate."""
        self._check_pairs("pairs", pairs)
        keys, order = self._sorted_keys
        wanted = self._keys(pairs)
        slot = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
        return torch.where(keys[slot] == wanted, order[slot], -1)

    def feasible(self, threshold: float) -> Tensor:
        """bool [K]: seen pairs, and unseen ones whose feasibility is at least the threshold (compared in float64)."""
        if self.feasibility is None:
            raise CaptError("PairSpace: pruning needs the feasibility of the pairs, but this space has none")
        return self.seen | (self.feasibility.double() >= threshold)

    def pruned(self, threshold: float) -> PairSpace:
        """The same space without the unseen pairs whose feasibility lies below the threshold."""
        kept = self.feasible(threshold)
        feasibility = None if self.feasibility is None else self.feasibility[kept]
        return PairSpace(self.pairs[kept], self.seen[kept], self.n_states, self.n_objects, feasibility)

    @cached_property
    def _sorted_keys(self) -> tuple[Tensor, Tensor]:
        keys, order = torch.sort(self._keys(self.pairs))
        return keys, order

    def _keys(self, pairs: Tensor) -> Tensor:
        return pairs[:, 0] * self.n_objects + pairs[:, 1]

    def _check_pairs(self, name: str, pairs: Tensor) -> None:
        check_tensor("PairSpace", name, pairs, ("N", 2))
        if pairs.dtype != torch.int64:
            raise CaptError(f"PairSpace: {name} must be int64, found {pairs.dtype}; call .long()")
        sizes = {"state": self.n_states, "object": self.n_objects}
        for column, (kind, size) in enumerate(sizes.items()):
            check_count("PairSpace", f"n_{kind}s", size)
            wrong = ((pairs[:, column] < 0) | (pairs[:, column] >= size)).nonzero().flatten()
            if len(wrong):
                row = int(wrong[0])
                raise DataError(
                    f"PairSpace: pair {row} of {name} is {tuple(pairs[row].tolist())}, but there are only {size} "
                    f"{kind}s, 0 to {size - 1}"
                )
