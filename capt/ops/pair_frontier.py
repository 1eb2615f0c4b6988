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
    """score [B, G] in the dtype of the scores (-inf: none yet) and pair int64 [B, G] (-1: none yet)."""

    score: Tensor
    pair: Tensor


def plan(backend: str | None = None) -> Plan:
    """Backend of a call."""
    return reference_only(OP, backend)


def pair_frontier(
    scores: Tensor,
    *,
    group: Tensor,
    n_groups: int = 2,
    start: int = 0,
    previous: PairFrontier | None = None,
    backend: str | None = None,
) -> PairFrontier:
    """Fold one chunk of pair scores into the best pair per image and group.

    scores [B, K] of the pairs start .. start+K-1; group int64 [K]: the group of each pair, e.g. 0 seen, 1 unseen (or
    1 + the number of feasibility thresholds it survives), -1 for a pair that is no candidate. previous: the frontier
    of earlier chunks. Only [B, G] numbers survive a chunk, so no image x pair matrix is ever held.

    Equal scores go to the lower pair, whatever the order of the chunks; NaN and -inf never win. No gradient. With
    a = seen, u = unseen: an image is predicted seen under bias b exactly if a > u + b. Source: reduced form of MSCI's
    evaluation, ours. Raises CaptError.
    """
    check_tensor(OP, "scores", scores, ("B", "K"))
    check_tensor(OP, "group", group, (scores.shape[1],))
    check_float(OP, scores=scores)
    check_integer(OP, group=group)
    n_groups = check_count(OP, "n_groups", n_groups)
    start = check_count(OP, "start", start, low=0)
    check_index_range(OP, "group", group, -1, n_groups)
    check_same_device(OP, scores=scores, group=group, previous=None if previous is None else previous.score)
    plan(backend)
    new = PairFrontier(*reference.pair_frontier(scores.detach(), group, start, n_groups))
    if previous is None:
        return new
    shape = list(new.score.shape)
    found = list(previous.score.shape)
    if found != shape:
        raise CaptError(f"{OP}: previous must have shape {shape} like this chunk's frontier, found {found}")
    older = (previous.score > new.score) | (
        (previous.score == new.score) & (previous.pair >= 0) & ((new.pair < 0) | (previous.pair < new.pair))
    )
    return PairFrontier(torch.where(older, previous.score, new.score), torch.where(older, previous.pair, new.pair))
