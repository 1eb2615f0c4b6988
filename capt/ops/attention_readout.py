"""One query's attention, accumulated per group of keys under several key biases."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from capt import reference
from capt.errors import CaptError
from capt.ops._checks import (
    check_count,
    check_float,
    check_index_range,
    check_integer,
    check_number,
    check_same_device,
    check_tensor,
)
from capt.ops._plan import Plan, reference_only

OP = "attention_readout"


class AttentionReadout(NamedTuple):
    """mean [M, B, H, G, dh]: attention-weighted mean value of each group (zeros for an empty group).

    log_mass [M, B, H, G]: log of the summed exponentials of each group (-inf for an empty group); its softmax over G
    is the attention share of each group, and ``(share[..., None] * mean).sum(-2)`` is ordinary attention.
    """

    mean: Tensor
    log_mass: Tensor


def plan(backend: str | None = None) -> Plan:
    """Backend of a call."""
    return reference_only(OP, backend)


def attention_readout(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    groups: Tensor,
    n_groups: int,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> AttentionReadout:
    """Attention of one pooling query, split by groups of keys, for M biases in one read.

    query [B, H, dh] or [H, dh] (learned, the same for every image); keys and values [B, L, H, dh]; groups int64 [L] or
    [B, L] in [0, n_groups): class token, centre, border, ring, region...; bias [M, H, L] or [M, 1, L] is added to the
    scaled scores (M = 1 without it); scale defaults to dh**-0.5.

    Every re-weighting that acts on whole groups is a weighted sum of ``mean`` with weights made from ``log_mass``, so
    no attention row needs to be written. Results in float32 (float64 for float64). Differentiable.
    Source: ours, for the center-bias study. Raises CaptError.
    """
    check_tensor(OP, "keys", keys, ("B", "L", "H", "dh"))
    batch, length, n_heads, head_dim = keys.shape
    check_tensor(OP, "values", values, (batch, length, n_heads, head_dim))
    learned = isinstance(query, Tensor) and query.dim() == 2
    check_tensor(OP, "query", query, (n_heads, head_dim) if learned else (batch, n_heads, head_dim))
    same = isinstance(groups, Tensor) and groups.dim() == 1
    check_tensor(OP, "groups", groups, (length,) if same else (batch, length))
    if bias is not None:
        check_tensor(OP, "bias", bias, ("M", "H or 1", length))
        if bias.shape[1] not in (1, n_heads):
            raise CaptError(f"{OP}: bias must have {n_heads} heads or 1, found {bias.shape[1]}")
    check_float(OP, query=query, keys=keys, values=values, bias=bias)
    check_integer(OP, groups=groups)
    n_groups = check_count(OP, "n_groups", n_groups)
    check_index_range(OP, "groups", groups, 0, n_groups)
    check_same_device(OP, query=query, keys=keys, values=values, groups=groups, bias=bias)
    plan(backend)
    scale = max(head_dim, 1) ** -0.5 if scale is None else check_number(OP, "scale", scale)
    return AttentionReadout(*reference.attention_readout(query, keys, values, groups, n_groups, bias, scale))
