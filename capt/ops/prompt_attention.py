"""Attention over commonality and difference prompts, both streams in one call."""

from __future__ import annotations

from torch import Tensor

from capt import reference
from capt.ops._checks import (
    check,
    check_count,
    check_float,
    check_index_range,
    check_integer,
    check_same_device,
    check_tensor,
)
from capt.ops._plan import Plan, reference_only

OP = "prompt_attention"
SHARED = "prompt_attention_shared"


def plan(backend: str | None = None) -> Plan:
    """Backend of a gathered call."""
    return reference_only(OP, backend)


def plan_shared(backend: str | None = None) -> Plan:
    """Backend of a shared-key call."""
    return reference_only(SHARED, backend)


def prompt_attention(
    query: Tensor,
    commonality: Tensor,
    difference: Tensor,
    *,
    commonality_index: Tensor,
    difference_index: Tensor,
    log_prior: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One query per image attends to the prompt rows of its k confusion pairs, once per kind.

    query [B, d]; tables commonality [n, s, d] and difference [m, s', d]; indices int64 [B, k] into them, -1 for a pair
    that is absent; log_prior [B, k] is added to all rows of a pair (may be -inf); scale defaults to d**-0.5.
    Per kind: softmax over the k*s rows of ``scale * query . row + log_prior``, then the weighted sum of the rows.

    Returns (h_commonality, h_difference), [B, d] in the query's dtype; an image without any row gets zeros.
    Differentiable in query, tables and log_prior. Source: ours, after CAPT's guidance prompts. Raises CaptError.
    """
    check_tensor(OP, "query", query, ("B", "d"))
    batch, dim = query.shape
    check_tensor(OP, "commonality", commonality, ("n", "s", dim))
    check_tensor(OP, "difference", difference, ("n", "s", dim))
    check_tensor(OP, "commonality_index", commonality_index, (batch, "k"))
    check_tensor(OP, "difference_index", difference_index, (batch, commonality_index.shape[1]))
    check_float(OP, query=query, commonality=commonality, difference=difference, log_prior=log_prior)
    check_integer(OP, commonality_index=commonality_index, difference_index=difference_index)
    check_index_range(OP, "commonality_index", commonality_index, -1, commonality.shape[0])
    check_index_range(OP, "difference_index", difference_index, -1, difference.shape[0])
    if log_prior is not None:
        check_tensor(OP, "log_prior", log_prior, tuple(commonality_index.shape))
    check_same_device(
        OP,
        query=query,
        commonality=commonality,
        difference=difference,
        commonality_index=commonality_index,
        difference_index=difference_index,
        log_prior=log_prior,
    )
    plan(backend)
    return reference.prompt_attention(
        query,
        commonality,
        difference,
        commonality_index,
        difference_index,
        log_prior,
        dim**-0.5 if scale is None else float(scale),
    )


def prompt_attention_shared(
    commonality_query: Tensor,
    difference_query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    n_heads: int,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stacked class prompts of both kinds attend to the tokens of each image.

    Queries [R, D] (the same for every image) or [B, R, D]; keys and values [B, L, D] with L >= 1; D divisible by
    n_heads; scale defaults to (D / n_heads)**-0.5.

    Returns (out_commonality, out_difference, lse_commonality, lse_difference): outputs [B, R, D] in the dtype of keys;
    log-sum-exp of the scaled scores [B, n_heads, R] in float32 (float64 for float64), with which softmaxes over split
    keys can be merged. Source: ours; the split-softmax identity follows from the definition. Raises CaptError.
    """
    check_tensor(SHARED, "keys", keys, ("B", "L", "D"))
    batch, n_keys, dim = keys.shape
    check_tensor(SHARED, "values", values, (batch, n_keys, dim))
    check(n_keys >= 1, f"{SHARED}: keys must hold at least one token, found shape {list(keys.shape)}")
    for name, query in (("commonality_query", commonality_query), ("difference_query", difference_query)):
        check(query.dim() in (2, 3), f"{SHARED}: {name} must be [R, D] or [B, R, D], found {list(query.shape)}")
        check_tensor(SHARED, name, query, ("R", dim) if query.dim() == 2 else (batch, "R", dim))
    check_float(
        SHARED, commonality_query=commonality_query, difference_query=difference_query, keys=keys, values=values
    )
    check_count(SHARED, "n_heads", n_heads)
    check(dim % n_heads == 0, f"{SHARED}: width {dim} is not divisible by n_heads={n_heads}")
    check_same_device(
        SHARED, commonality_query=commonality_query, difference_query=difference_query, keys=keys, values=values
    )
    plan_shared(backend)
    return reference.prompt_attention_shared(
        commonality_query,
        difference_query,
        keys,
        values,
        n_heads,
        (dim // n_heads) ** -0.5 if scale is None else float(scale),
    )
