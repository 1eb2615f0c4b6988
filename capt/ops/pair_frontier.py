"""Best seen and best unseen pair of each image over streamed chunks of pairs.

The native op ``capt::pair_frontier`` is defined in csrc/torch/pair_frontier.cpp; the Triton one has the same schema in
the namespace ``capt_triton``. There is no CUDA C++ kernel: the op reads its scores once, which Triton does as well.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from capt.errors import CaptError
from capt.ops._checks import (
    check_count,
    check_float,
    check_index_range,
    check_integer,
    check_same_device,
    check_tensor,
)
from capt.ops._plan import HAS_TRITON, NATIVE, Dispatch, Plan, slow_half
from capt.reference import accumulate_dtype
from capt.reference_frontier import pair_frontier as reference

OP = "pair_frontier"
DISPATCH = Dispatch(
    OP,
    {
        "cpu": "one visit of each score, compared with the best of its group so far (docs/kernels/pair_frontier.md)",
        "triton": "one visit of each score; the op has no CUDA C++ kernel",
    },
)


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
    chosen, _ = DISPATCH.choose(scores.device.type, scores.dtype, backend, {"cpu": slow_half(scores.dtype)})
    scores = scores.detach()
    if state is not None and object is not None:
        state, object = state.detach(), object.detach()
    if chosen == "reference":
        return PairFrontier(*reference(scores, group, start, n_groups, state, object, pairs, previous))
    if state is not None and object is not None and pairs is not None:
        state, object, pairs = state.float().contiguous(), object.float().contiguous(), pairs.contiguous()
    earlier = (None, None) if previous is None else tuple(value.detach().contiguous() for value in previous)
    op = torch.ops.capt_triton.pair_frontier if chosen == "triton" else torch.ops.capt.pair_frontier
    return PairFrontier(*op(scores, group.contiguous(), n_groups, start, state, object, pairs, *earlier))


def plan(
    *,
    batch: int,
    n_pairs: int,
    n_groups: int = 2,
    n_states: int = 0,
    n_objects: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str | None = None,
) -> Plan:
    """The backend of a call of this size, why, and its compulsory traffic and arithmetic (``previous`` not counted).

    n_states and n_objects: of the primitive term; 0 without it.
    """
    place = torch.device(device).type
    against = {"cpu": slow_half(dtype)}
    chosen, reason = DISPATCH.choose(place, dtype, backend, against)
    term = n_states > 0
    size = 4 if term else dtype.itemsize
    traffic = batch * (n_pairs * dtype.itemsize + 4 * (n_states + n_objects) + n_groups * (size + 8))
    traffic += n_pairs * (24 if term else 8)
    # A comparison a pair; a product and a sum before it.
    return Plan(
        OP, chosen, reason, traffic, batch * n_pairs * (3 if term else 1), DISPATCH.rejected(place, dtype, against)
    )


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
        if not isinstance(previous, tuple) or len(previous) != 2:
            raise CaptError(f"{OP}: previous must be the result of an earlier call, found {type(previous).__name__}")
        dtype = scores.dtype if state is None else accumulate_dtype(scores.dtype)
        for name, value, kind in zip(("score", "pair"), previous, (dtype, torch.int64), strict=True):
            check_tensor(OP, f"previous {name}", value, (batch, n_groups))
            if value.dtype != kind:
                raise CaptError(f"{OP}: previous {name} must be {kind} as this call returns, found {value.dtype}")
            tensors[f"previous {name}"] = value
    check_same_device(OP, **tensors)


# ---- registration ------------------------------------------------------------------------------------------------


def _fake(
    scores: Tensor,
    group: Tensor,
    n_groups: int,
    start: int,
    state: Tensor | None,
    object: Tensor | None,
    pairs: Tensor | None,
    previous_score: Tensor | None,
    previous_pair: Tensor | None,
) -> tuple[Tensor, Tensor]:
    torch._check(scores.dim() == 2, lambda: "capt::pair_frontier: scores must be [B, K]")
    shape = (scores.shape[0], n_groups)
    dtype = scores.dtype if state is None else torch.float32
    return scores.new_empty(shape, dtype=dtype), scores.new_empty(shape, dtype=torch.int64)


def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    from capt.kernels import pair_frontier as kernels

    found: tuple[Tensor, Tensor] = kernels.pair_frontier(*args)
    return found


def _define_triton() -> None:
    """capt_triton::pair_frontier: the schema of csrc/torch/pair_frontier.cpp, run by Triton."""
    torch.library.define(
        "capt_triton::pair_frontier",
        "(Tensor scores, Tensor group, int n_groups, int start, Tensor? state, Tensor? object, Tensor? pairs, "
        "Tensor? previous_score, Tensor? previous_pair) -> (Tensor score, Tensor pair)",
    )
    torch.library.impl("capt_triton::pair_frontier", "cuda", _triton)
    torch.library.register_fake("capt_triton::pair_frontier", _fake)


if NATIVE.loaded:
    torch.library.register_fake("capt::pair_frontier", _fake)
if HAS_TRITON:
    _define_triton()
