"""What one would write without the ops: gather and softmax over prompt rows, packings of torch's attention."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def eager(query: Tensor, table: Tensor, index: Tensor, log_prior: Tensor) -> Tensor:
    """One stream of gathered attention by batched matrix products. Every pair must be present."""
    rows = table[index].flatten(1, 2)  # [B, k*s, d]
    score = torch.bmm(rows, query[:, :, None])[..., 0] * query.shape[1] ** -0.5
    score = score + log_prior.repeat_interleave(table.shape[1], 1)
    return torch.bmm(score.softmax(-1)[:, None], rows)[:, 0]


def einsum(query: Tensor, table: Tensor, index: Tensor, log_prior: Tensor) -> Tensor:
    """The same by einsum, as the definition reads."""
    rows = table[index]
    score = torch.einsum("bd,bksd->bks", query, rows) * query.shape[1] ** -0.5 + log_prior[..., None]
    return torch.einsum("br,brd->bd", score.flatten(1).softmax(-1), rows.flatten(1, 2))


def _heads(x: Tensor, n_heads: int) -> Tensor:
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def packed(com: Tensor, diff: Tensor, keys: Tensor, values: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """Both streams stacked along the query axis, one attention call."""
    query = torch.cat([com, diff]).expand(len(keys), -1, -1)
    out = F.scaled_dot_product_attention(*(_heads(x, n_heads) for x in (query, keys, values)))
    out = out.transpose(1, 2).flatten(2)
    return out[:, : len(com)], out[:, len(com) :]


def two_calls(com: Tensor, diff: Tensor, keys: Tensor, values: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """One attention call a stream."""
    k, v = _heads(keys, n_heads), _heads(values, n_heads)
    first, second = (
        F.scaled_dot_product_attention(_heads(query.expand(len(keys), -1, -1), n_heads), k, v)
        .transpose(1, 2)
        .flatten(2)
        for query in (com, diff)
    )
    return first, second


def forced(backend: SDPBackend) -> Callable[..., tuple[Tensor, Tensor]]:
    """``packed`` on one of torch's attention kernels, which raises where that kernel cannot run."""

    def run(*inputs: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
        with sdpa_kernel(backend):
            return packed(*inputs, n_heads=n_heads)

    return run


@functools.cache
def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    return compiled


def flex(com: Tensor, diff: Tensor, keys: Tensor, values: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """``packed`` by FlexAttention, compiled."""
    query = torch.cat([com, diff]).expand(len(keys), -1, -1)
    out = _flex()(*(_heads(x, n_heads).contiguous() for x in (query, keys, values))).transpose(1, 2).flatten(2)
    return out[:, : len(com)], out[:, len(com) :]


#: On a GPU, in place of torch's own choice.
FORCED = {
    "packed, flash": forced(SDPBackend.FLASH_ATTENTION),
    "packed, cudnn": forced(SDPBackend.CUDNN_ATTENTION),
    "packed, efficient": forced(SDPBackend.EFFICIENT_ATTENTION),
}
GPU_SHARED = {**FORCED, "flex": flex}
GATHERED = {"eager": eager, "einsum": einsum}
SHARED = {"packed": packed, "two_calls": two_calls}
