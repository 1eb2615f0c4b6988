"""How the logits of pairs, states and objects become one score per pair."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from capt.ops._checks import check_count, check_tensor

#: Pairs that the published test script encodes at a time, each time with all states and objects again.
RELEASED_CHUNK = 1024


class PrimitiveFactors(NamedTuple):
    """Float [B, n_states] and [B, n_objects]: the product of the two factors of a pair is added to its score."""

    state: Tensor
    object: Tensor


def released_copies(n_pairs: int) -> int:
    """How often the published test script repeats every state and object when it scores ``n_pairs`` pairs."""
    return -(-check_count("released_copies", "n_pairs", n_pairs) // RELEASED_CHUNK)


def primitive_factors(
    state_logits: Tensor,
    object_logits: Tensor,
    *,
    state_weight: float = 1.0,
    object_weight: float = 1.0,
    copies: int = 1,
) -> PrimitiveFactors:
    """Weighted probabilities of states and objects.

    A weight of exactly 0 makes its factor 1; with both 0 every score grows by 1, which changes no prediction. copies:
    how often every name stands in the softmax (:func:`released_copies` for the published numbers, which divides each
    probability by it).

    Args:
        state_logits: [B, n_states].
        object_logits: [B, n_objects].
    """
    check_tensor("primitive_factors", "state_logits", state_logits, ("B", "n_states"))
    check_tensor("primitive_factors", "object_logits", object_logits, (len(state_logits), "n_objects"))
    check_count("primitive_factors", "copies", copies)

    def factor(logits: Tensor, weight: float) -> Tensor:
        return torch.ones_like(logits) if weight == 0 else weight * (logits.softmax(1) / copies)

    return PrimitiveFactors(factor(state_logits, state_weight), factor(object_logits, object_weight))


def pair_scores(pair_logits: Tensor, pairs: Tensor, factors: PrimitiveFactors, *, pair_weight: float = 1.0) -> Tensor:
    """Score of each pair: ``pair_weight * pair_logits + state factor * object factor``, a new tensor [B, k].

    Args:
        pair_logits: [B, k].
        pairs: int64 [k, 2] (state, object) of the columns.
        factors: see :func:`primitive_factors`.
    """
    check_tensor("pair_scores", "pair_logits", pair_logits, (len(factors.state), "k"))
    check_tensor("pair_scores", "pairs", pairs, (pair_logits.shape[1], 2))
    return pair_weight * pair_logits + factors.state[:, pairs[:, 0]] * factors.object[:, pairs[:, 1]]
