"""The mixture of experts without the op: the loop over experts of the published method, and one dense formulation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def router(x: Tensor, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """linear, softmax, topk, renormalise, and the share of rows an expert gets, all in the dtype of x."""
    probs = F.linear(x, gate).softmax(-1)
    value, index = probs.topk(top_k, dim=-1)
    weights = torch.zeros_like(probs).scatter_(-1, index, value / value.sum(-1, keepdim=True))
    return weights, probs, (weights > 0).float().mean(0)


def router_without_load(x: Tensor, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """linear, softmax, topk, renormalise alone: weights and indices of the kept experts."""
    value, index = F.linear(x, gate).softmax(-1).topk(top_k, dim=-1)
    return value / value.sum(-1, keepdim=True), index


def loop(x: Tensor, gate: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, top_k: int) -> Tensor:
    """Expert by expert: pick its tokens, run it on them, add the weighted result back."""
    value, index = F.linear(x, gate).softmax(-1).topk(top_k, dim=-1)
    value = value / value.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for e in range(len(gate)):
        token, slot = torch.where(index == e)
        if len(token):
            hidden = F.linear(x.index_select(0, token), w_in[e], b_in[e])
            hidden = hidden * torch.sigmoid(1.702 * hidden)
            out.index_add_(0, token, F.linear(hidden, w_out[e], b_out[e]) * value[token, slot, None])
    return out


def dense(x: Tensor, gate: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, top_k: int) -> Tensor:
    """Every expert on every token as two batched products, without data-dependent shapes; meant for torch.compile."""
    probs = F.linear(x, gate).softmax(-1)
    value, index = probs.topk(top_k, dim=-1)
    weights = torch.zeros_like(probs).scatter(-1, index, value / value.sum(-1, keepdim=True))
    hidden = torch.baddbmm(b_in[:, None], x.expand(len(gate), -1, -1), w_in.mT)
    out = torch.baddbmm(b_out[:, None], hidden * torch.sigmoid(1.702 * hidden), w_out.mT)
    return (out * weights.T[..., None]).sum(0)


def grouped(x: Tensor, gate: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, top_k: int) -> Tensor:
    """Tokens sorted by expert, two grouped products (torch has them on GPUs, for bfloat16), nothing that waits."""
    value, index = F.linear(x, gate).softmax(-1).topk(top_k, dim=-1)
    value = value / value.sum(-1, keepdim=True)
    expert, order = index.flatten().sort()
    token = order // top_k
    ends = torch.searchsorted(expert, torch.arange(len(gate), device=x.device), right=True).int()
    hidden = torch._grouped_mm(x[token], w_in.mT, offs=ends) + b_in[expert]
    hidden = hidden * torch.sigmoid(1.702 * hidden)
    out = torch._grouped_mm(hidden, w_out.mT, offs=ends) + b_out[expert]
    return torch.zeros_like(x).index_add_(0, token, out * value.flatten()[order, None])
