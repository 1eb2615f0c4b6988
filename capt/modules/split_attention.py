"""Rows shared by a batch attend to themselves and to the tokens of each image, with one softmax over both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from capt.errors import CaptError
from capt.ops._plan import slow_half
from capt.ops.prompt_attention_shared import DISPATCH
from capt.reference import accumulate_dtype

#: Scores that the form without kernels holds at once: a few megabytes, so that memory does not grow with C^2.
BLOCK_SCORES = 1 << 20


def split_attention(
    query: Tensor, own_keys: Tensor, own_values: Tensor, keys: Tensor, values: Tensor, *, n_heads: int
) -> Tensor:
    """Attention [B, C, D] of queries [C, D] to own keys and values [C, D] together with those of an image [B, W, D].

    What does not depend on the image is done once for the batch, in the backward pass, too: a softmax over two parts
    is that over each, weighted by their log-sum-exps, and each part's gradients are those of attention alone, given
    the joint result and log-sum-exp. All of one floating dtype; softmax and log-sum-exps of 16-bit inputs in float32.
    Differentiable once; a derivative of its derivative raises CaptError.

    Source: ours; the identities follow from the definition.
    """
    result: Tensor = _SplitAttention.apply(query, own_keys, own_values, keys, values, n_heads)
    return result


class _SplitAttention(torch.autograd.Function):
    """Saves the joint result and the log-sum-exps; nothing of the size of the scores."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, own_keys: Tensor, own_values: Tensor, keys: Tensor, values: Tensor, n_heads: int
    ) -> Tensor:
        of_own, lse_own = attend(query, own_keys[None], own_values[None], n_heads)
        out, lse = attend(query, keys, values, n_heads)
        share = torch.sigmoid(lse_own - lse).to(out.dtype)
        by_head(out, n_heads).lerp_(by_head(of_own, n_heads), share.transpose(1, 2)[..., None])
        lse = torch.logaddexp(lse, lse_own)
        ctx.save_for_backward(query, own_keys, own_values, keys, values, of_own, lse_own, out, lse)
        ctx.n_heads = n_heads
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():  # the graph of this backward is asked for; it has none
            raise CaptError("split_attention: a gradient of a gradient was asked for, but it is differentiable once")
        query, own_keys, own_values, keys, values, of_own, lse_own, out, lse = ctx.saved_tensors
        n_heads, grad = ctx.n_heads, grad.contiguous()
        d_query, d_keys, d_values = attend_backward(grad, None, query, keys, values, out, lse, n_heads)
        share = (lse_own - lse).exp_()
        grads = by_head(grad, n_heads)
        of_rows = torch.linalg.vecdot(grads, by_head(out, n_heads)).transpose(1, 2).to(share.dtype)
        own_grad = torch.einsum("bhc,bchd->chd", share.to(grad.dtype), grads).flatten(1)[None]
        # attend_backward takes the mean of the joint result where it would take that of the part's own.
        within = torch.linalg.vecdot(by_head(own_grad, n_heads), by_head(of_own, n_heads)).transpose(1, 2)
        shift = within.to(share.dtype) - (share * of_rows).sum(0, keepdim=True)
        more_query, d_own_keys, d_own_values = attend_backward(
            own_grad, shift, query, own_keys[None], own_values[None], of_own, lse_own, n_heads
        )
        return d_query.add_(more_query), d_own_keys[0], d_own_values[0], d_keys, d_values, None


def by_head(x: Tensor, n_heads: int) -> Tensor:
    """[..., D] as [..., h, D / h]."""
    heads: Tensor = x.unflatten(-1, (n_heads, -1))
    return heads


def attend(query: Tensor, keys: Tensor, values: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """Queries [C, D] to keys and values [B, L, D]: the result [B, C, D] and the log-sum-exp of the scores [B, h, C]."""
    scale, kernels = _scale(query, n_heads), _kernels(query)
    if kernels is not None:
        out, _, lse, _ = kernels.prompt_attention_shared.default(query, query[:0], keys, values, n_heads, scale)
        return out, lse
    out = query.new_empty(len(keys), *query.shape)
    lse = query.new_empty(len(keys), n_heads, len(query), dtype=accumulate_dtype(query.dtype))
    q, k, v, o = (by_head(x, n_heads).transpose(-3, -2) for x in (query * scale, keys, values, out))
    for rows in _blocks(query, keys, n_heads):
        scores = (q[:, rows] @ k.mT).to(lse.dtype)
        lse[..., rows] = scores.logsumexp(-1)
        o[..., rows, :] = scores.softmax(-1).to(v.dtype) @ v
    return out, lse


def attend_backward(
    grad: Tensor, grad_lse: Tensor | None, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, lse: Tensor,
    n_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values, given those of :func:`attend`'s results.

    With the result and the log-sum-exp of more keys than these: the gradients of attention to all of them.
    """
    scale, kernels = _scale(query, n_heads), _kernels(query)
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    if kernels is not None:
        none, no_rows, no_lse = query[:0], grad[:, :0], lse[..., :0]
        d_query, _, d_keys, d_values = kernels.prompt_attention_shared_backward.default(
            grad, no_rows, grad_lse, no_lse, query, none, keys, values, out, no_rows, lse, no_lse, n_heads, scale,
            True, True, True,
        )  # fmt: skip
        return d_query, d_keys, d_values
    results = d_query, d_keys, d_values = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values)
    q, k, v, g, o = (by_head(x, n_heads).transpose(-3, -2) for x in (query * scale, keys, values, grad, out))
    dq, dk, dv = (by_head(x, n_heads).transpose(-3, -2) for x in results)
    for rows in _blocks(query, keys, n_heads):
        some, up = q[:, rows], g[..., rows, :]
        weights = ((some @ k.mT).to(lse.dtype) - lse[..., rows, None]).exp_()
        mean = torch.linalg.vecdot(up, o[..., rows, :]).to(lse.dtype) - grad_lse[..., rows]
        back = ((up @ v.mT).to(lse.dtype) - mean[..., None]).mul_(weights).to(query.dtype)
        dq[:, rows] = (back @ k).sum(0) * scale
        dk += back.mT @ some
        dv += weights.to(query.dtype).mT @ up
    return d_query, d_keys, d_values


def _scale(query: Tensor, n_heads: int) -> float:
    return float((query.shape[-1] // n_heads) ** -0.5)


def _kernels(query: Tensor) -> Any:
    """The namespace of ops that runs these tensors; None: plain torch."""
    chosen, _ = DISPATCH.choose(query.device.type, query.dtype, None, {"cpu": slow_half(query.dtype)})
    return {"reference": None, "triton": torch.ops.capt_triton}.get(chosen, torch.ops.capt)


def _blocks(query: Tensor, keys: Tensor, n_heads: int) -> Iterator[slice]:
    """Rows of queries whose scores are held at once."""
    step = max(1, BLOCK_SCORES // max(1, len(keys) * n_heads * keys.shape[1]))
    return (slice(start, start + step) for start in range(0, len(query), step))
