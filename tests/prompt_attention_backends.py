"""Turns the four functions of a backend of prompt attention into ops with gradients, for kernels that run on the CPU
only through an interpreter or an emulation and so are no backend of capt.ops there.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.parity import prompt_attention as gathered_parity
from benchmarks.parity import prompt_attention_shared as shared_parity


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Callable, backward: Callable, *inputs: Any) -> tuple[Tensor, Tensor]:
        *outs, weight_com, weight_diff = forward(*inputs)
        *tensors, ctx.scale = inputs
        ctx.backward_of = backward
        ctx.save_for_backward(*tensors, weight_com, weight_diff)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, weight_com, weight_diff = ctx.saved_tensors
        query, com, diff, _, _, prior = (bool(needed) for needed in ctx.needs_input_grad[2:8])
        found = ctx.backward_of(
            *grads, *tensors, ctx.scale, weight_com, weight_diff, query, com or diff, prior
        )  # fmt: skip
        wanted = [g if need else None for g, need in zip(found, (query, com, diff, prior), strict=True)]
        return None, None, *wanted[:3], None, None, wanted[3], None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Callable, backward: Callable, *inputs: Any) -> tuple[Tensor, ...]:
        found = forward(*inputs)
        *tensors, ctx.heads, ctx.scale = inputs
        ctx.backward_of = backward
        ctx.save_for_backward(*tensors, *found)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        com, diff, keys, values = (bool(needed) for needed in ctx.needs_input_grad[2:6])
        found = ctx.backward_of(*grads, *ctx.saved_tensors, ctx.heads, ctx.scale, com or diff, keys, values)
        wanted = [g if need else None for g, need in zip(found, (com, diff, keys, values), strict=True)]
        return None, None, *wanted, None, None


def operators(gathered: tuple[Callable, Callable], shared: tuple[Callable, Callable]) -> SimpleNamespace:
    """``prompt_attention`` and ``prompt_attention_shared`` of capt.ops out of (forward, backward) pairs."""

    def prompt_attention(query: Tensor, com: Tensor, diff: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        scale, prior = given["scale"], given["log_prior"]
        indices = given["commonality_index"], given["difference_index"]
        prior = prior if prior is None else prior.float()
        scale = query.shape[1] ** -0.5 if scale is None else scale
        return _Gathered.apply(*gathered, query, com, diff, *indices, prior, scale)

    def prompt_attention_shared(*tensors: Tensor, n_heads: int, scale: float | None) -> tuple[Tensor, ...]:
        scale = (tensors[2].shape[2] // n_heads) ** -0.5 if scale is None else scale
        return _Shared.apply(*shared, *tensors, n_heads, scale)

    return SimpleNamespace(prompt_attention=prompt_attention, prompt_attention_shared=prompt_attention_shared)


def complaint(parity: Any, seed: int, ops: SimpleNamespace) -> str:
    """What is wrong with the results of ``ops`` on a seeded problem; empty if nothing is."""
    problem = parity.problem(seed)
    with patch.object(parity, "ops", ops):
        found = parity.run(problem)
    return str(parity.complaint(problem, found))


PARITIES = {"prompt_attention": gathered_parity, "prompt_attention_shared": shared_parity}
