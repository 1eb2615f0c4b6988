"""How plausible an unseen (state, object) pair is, from the similarity of words."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from capt.errors import CaptError, DataError
from capt.evaluation.pair_space import PairSpace
from capt.ops._checks import check_count, check_float, check_tensor


def feasibility(states: Tensor, objects: Tensor, seen_pairs: Any) -> Tensor:
    """Feasibility of every pair, float32 [n_states, n_objects].

    A pair (s, o) is as plausible as o resembles another object that was seen with s, and s another state that was seen
    with o: the mean of the two highest cosines, each -1 where there is no such partner. Seen pairs hold 0.

    Args:
        states: float [n_states, d], one word or text vector per state, of any length.
        objects: float [n_objects, d].
        seen_pairs: int [M, 2] (state, object) of the training split.

    Source: the formula of the published open-world evaluations; their vectors are GloVe's, any text encoder will do.
    """
    check_tensor("feasibility", "states", states, ("n_states", "d"))
    check_tensor("feasibility", "objects", objects, ("n_objects", states.shape[1]))
    check_float("feasibility", states=states, objects=objects)
    space = PairSpace.open_world(len(states), len(objects), seen_pairs)
    seen = space.seen.view(len(states), len(objects))
    by_object = _closest(objects, seen)
    by_state = _closest(states, seen.T).T
    return ((by_object + by_state) / 2).masked_fill(seen, 0.0).float()


def feasibility_thresholds(space: PairSpace, n: int = 50) -> Tensor:
    """``n`` evenly spaced thresholds from the lowest to the highest feasibility of an unseen pair, float64 [n]."""
    if space.feasibility is None:
        raise CaptError("feasibility_thresholds: the space has no feasibility; give it to PairSpace.open_world")
    values = space.feasibility[~space.seen].double()
    if not len(values):
        raise DataError("feasibility_thresholds: every pair of the space is seen, so there is nothing to prune")
    check_count("feasibility_thresholds", "n", n)
    return torch.from_numpy(np.linspace(float(values.min()), float(values.max()), n))


def _closest(vectors: Tensor, linked: Tensor) -> Tensor:
    """Highest cosine of each of n items to a member of a group, -1 for no member, float64 [G, n]; linked bool [G, n].

    No item needs to be kept apart from itself: a member belongs to a seen pair, whose value is not used.
    """
    unit = F.normalize(vectors.detach().cpu().double(), dim=1)
    cosine = unit @ unit.T
    none = cosine.new_full((len(unit),), -1.0)
    return torch.stack([cosine[members].amax(0) if members.any() else none for members in linked])
