"""Best seen and best unseen pair of each image over streamed chunks of pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from capt import reference
from capt.errors import CaptError
from capt.ops._checks import (
    check_count,
    check_float,
    check_index_range,
    check_integer,
    check_same_device,
    check_tensor,
)
from capt.ops._plan import Plan, reference_only

OP = "pair_frontier"


class PairFrontier(NamedTuple):
    """score [B, G] (-inf: none yet) and pair int64 [B, G] (-1: none yet)."""

    score: Tensor
    pair: Tensor


def pair_frontier(
    scores: Tensor,
    *,
    group: Tensor,
    n_groups: int = 2,
    start: int = 0,
    state: Tensor | None = None,
    object: Tensor | None = None,
    pairs: Tensor | None = None,
    previous: PairFrontier | None = None,
    backend: str | None = None,
) -> PairFrontier:
    """Fold one chunk of pair scores into the best pair per image and group.

    scores [B, K] of the pairs start .. start+K-1; group int64 [K]: the group of each pair, e.g. 0 seen, 1 unseen (or
    1 + the number of feasibility thresholds it survives), -1 for a pair that is no candidate. previous: the frontier
    of earlier chunks. Only [B, G] numbers survive a chunk, so no image x pair matrix is ever held.

    state [B, n_states], object [B, n_objects], pairs int64 [K, 2] (all three or none): weighted probabilities of the
    primitives, and the (state, object) of each pair. Scores are then ``scores + state[:, s] * object[:, o]``: the
    product is rounded to float32, then the sum is (float64 for float64 scores), never fused, so that every backend
    gives the same bits.

    Returns score [B, G], float32 with the primitive term and the dtype of the scores without it (float64 stays), and
    pair int64 [B, G]. Equal scores go to the lower pair, whatever the order of the chunks; NaN and -inf never win; -0.0
    counts and is returned as 0.0. No gradient. With a = seen, u = unseen: an image is predicted seen under bias b
    exactly if a > u + b.

    Source: reduced form of MSCI's evaluation, ours. Raises CaptError, also when ``backend`` is forced and cannot run.

    >>> import torch
    >>> scores, group = torch.tensor([[3.0, 1.0, 4.0, 4.0, 9.0]]), torch.tensor([0, 0, 1, 1, -1])
    >>> first = pair_frontier(scores[:, :3], group=group[:3])
    >>> pair_frontier(scores[:, 3:], group=group[3:], start=3, previous=first).pair.tolist()
    [[0, 2]]
    """
    n_groups, start = check_count(OP, "n_groups", n_groups), check_count(OP, "start", start, low=0)
    _check_arguments(scores, group, n_groups, start, state, object, pairs, previous)
    plan(backend)
    scores = scores.detach()
    if state is not None and object is not None:
        state, object = state.detach(), object.detach()
    return PairFrontier(*reference.pair_frontier(scores, group, start, n_groups, state, object, pairs, previous))


def plan(backend: str | None = None) -> Plan:
    """Backend of a call."""
    return reference_only(OP, backend)


def _check_arguments(
    scores: Tensor,
    group: Tensor,
    n_groups: int,
    start: int,
    state: Tensor | None,
    object: Tensor | None,
    pairs: Tensor | None,
    previous: PairFrontier | None,
) -> None:
    check_tensor(OP, "scores", scores, ("B", "K"))
    batch, n_pairs = scores.shape
    check_tensor(OP, "group", group, (n_pairs,))
    check_float(OP, scores=scores)
    check_integer(OP, group=group)
    check_index_range(OP, "group", group, -1, n_groups)
    if start + n_pairs >= 1 << 31:
        raise CaptError(f"{OP}: start + K is {start + n_pairs}, at most {(1 << 31) - 1} is supported")
    given = [value is not None for value in (state, object, pairs)]
    if any(given) and not all(given):
        raise CaptError(f"{OP}: state, object and pairs belong together; give all three or none")
    if state is not None and object is not None and pairs is not None:
        check_tensor(OP, "state", state, (batch, "n_states"))
        check_tensor(OP, "object", object, (batch, "n_objects"))
        check_tensor(OP, "pairs", pairs, (n_pairs, 2))
        check_float(OP, state=state, object=object)
        check_integer(OP, pairs=pairs)
        check_index_range(OP, "states of pairs", pairs[:, 0], 0, state.shape[1])
        check_index_range(OP, "objects of pairs", pairs[:, 1], 0, object.shape[1])
    tensors = {"scores": scores, "group": group, "state": state, "object": object, "pairs": pairs}
    if previous is not None:
        dtype = scores.dtype if state is None else reference.accumulate_dtype(scores.dtype)
        for name, value, kind in zip(("score", "pair"), previous, (dtype, torch.int64), strict=True):
            check_tensor(OP, f"previous {name}", value, (batch, n_groups))
            if value.dtype != kind:
                raise CaptError(f"{OP}: previous {name} must be {kind} as this call returns, found {value.dtype}")
            tensors[f"previous {name}"] = value
    check_same_device(OP, **tensors)
