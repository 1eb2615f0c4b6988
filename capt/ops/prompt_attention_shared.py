"""Stacked class prompts of both kinds attend to the tokens of each image.

Reading order: public function, plan (which backend and why), argument checks, registration of the torch ops.
``capt::prompt_attention_shared`` and its backward are defined in csrc/torch/prompt_attention.cpp; the Triton ones have
the same schema in the namespace ``capt_triton``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from capt import reference
from capt.errors import CaptError
from capt.ops._checks import (
    check_count,
    check_float,
    check_number,
    check_same_device,
    check_tensor,
    differentiable_once,
    tangent_obstacles,
)
from capt.ops._plan import HAS_TRITON, NATIVE, Dispatch, Plan, slow_half

OP = "prompt_attention_shared"
#: No measured CPU shape is slower than the best packing of torch's attention (docs/kernels/prompt_attention.md).
DISPATCH = Dispatch(
    OP,
    {
        "cpu": "keys are packed once for both streams, frozen keys cost nothing (docs/kernels/prompt_attention.md)",
        "cuda": "compiled CUDA kernels are present",
        "triton": "no compiled CUDA kernels in this build, Triton is installed",
    },
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
    keys can be merged. 16-bit inputs: softmax and sums in float32. Differentiable once in all four inputs through all
    four results; frozen keys and values cost nothing. Bitwise repeatable, on the CPU for any number of threads.
    Inputs with contiguous channels are read in place. Source: ours; the split-softmax identity follows from the
    definition. Raises CaptError, also when ``backend`` is forced and cannot run.
    """
    n_heads = _checked_heads(commonality_query, difference_query, keys, values, n_heads)
    scale = max(keys.shape[2] // n_heads, 1) ** -0.5 if scale is None else check_number(OP, "scale", scale)
    inputs = (commonality_query, difference_query, keys, values)
    dtype = keys.dtype
    if any(value.dtype != dtype for value in inputs):  # float64 has no kernel, and float32 holds the others
        double = any(value.dtype == torch.float64 for value in inputs)
        dtype = torch.float64 if double else torch.float32
    chosen, _ = DISPATCH.choose(keys.device.type, dtype, backend, {"cpu": slow_half(dtype)}, tangent_obstacles(*inputs))
    if chosen == "reference":
        return reference.prompt_attention_shared(*inputs, n_heads, scale)
    namespace = torch.ops.capt_triton if chosen == "triton" else torch.ops.capt
    out_commonality, out_difference, lse_commonality, lse_difference = namespace.prompt_attention_shared.default(
        *(value.to(dtype) for value in inputs), n_heads, scale
    )
    return out_commonality.to(keys.dtype), out_difference.to(keys.dtype), lse_commonality, lse_difference


def plan(
    *,
    batch: int,
    rows: tuple[int, int],
    n_keys: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str | None = None,
) -> Plan:
    """The backend a forward call of this size would take, why, and its compulsory traffic and arithmetic.

    rows: query rows of each stream, taken to be the same for every image.
    """
    place = torch.device(device).type
    against = {"cpu": slow_half(dtype)}
    chosen, reason = DISPATCH.choose(place, dtype, backend, against)
    traffic = (sum(rows) * (1 + batch) + 2 * batch * n_keys) * dim * dtype.itemsize
    flops = 4 * batch * sum(rows) * n_keys * dim
    return Plan(OP, chosen, reason, traffic, flops, DISPATCH.rejected(place, dtype, against))


def _checked_heads(
    commonality_query: Tensor, difference_query: Tensor, keys: Tensor, values: Tensor, n_heads: int
) -> int:
    """n_heads as an int of Python, if all arguments fit."""
    check_tensor(OP, "keys", keys, ("B", "L", "D"))
    batch, n_keys, dim = keys.shape
    check_tensor(OP, "values", values, (batch, n_keys, dim))
    if n_keys < 1:
        raise CaptError(f"{OP}: keys must hold at least one token, found shape {list(keys.shape)}")
    for name, query in (("commonality_query", commonality_query), ("difference_query", difference_query)):
        if not isinstance(query, Tensor) or query.dim() not in (2, 3):
            found = list(getattr(query, "shape", ()))
            raise CaptError(f"{OP}: {name} must be a tensor [R, D] or [B, R, D], found {found}")
        check_tensor(OP, name, query, ("R", dim) if query.dim() == 2 else (batch, "R", dim))
    check_float(OP, commonality_query=commonality_query, difference_query=difference_query, keys=keys, values=values)
    n_heads = check_count(OP, "n_heads", n_heads)
    if dim % n_heads:
        raise CaptError(f"{OP}: width {dim} is not divisible by n_heads={n_heads}")
    check_same_device(
        OP, commonality_query=commonality_query, difference_query=difference_query, keys=keys, values=values
    )
    return n_heads


# ---- registration ------------------------------------------------------------------------------------------------

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _fake(
    commonality_query: Tensor, difference_query: Tensor, keys: Tensor, values: Tensor, n_heads: int, scale: float
) -> Four:
    torch._check(
        commonality_query.dtype == difference_query.dtype == keys.dtype == values.dtype,
        lambda: "capt::prompt_attention_shared: queries, keys and values must have one dtype",
    )
    batch, _, dim = keys.shape
    rows = commonality_query.shape[-2], difference_query.shape[-2]
    outs = [keys.new_empty((batch, r, dim)) for r in rows]
    sums = [keys.new_empty((batch, n_heads, r), dtype=torch.float32) for r in rows]
    return outs[0], outs[1], sums[0], sums[1]


def _fake_backward(
    grad_com: Tensor,
    grad_diff: Tensor,
    grad_lse_com: Tensor,
    grad_lse_diff: Tensor,
    commonality_query: Tensor,
    difference_query: Tensor,
    keys: Tensor,
    values: Tensor,
    out_com: Tensor,
    out_diff: Tensor,
    lse_com: Tensor,
    lse_diff: Tensor,
    n_heads: int,
    scale: float,
    need_query: bool,
    need_keys: bool,
    need_values: bool,
) -> Four:
    return (
        keys.new_empty(commonality_query.shape if need_query else 0),
        keys.new_empty(difference_query.shape if need_query else 0),
        keys.new_empty(keys.shape if need_keys else 0),
        keys.new_empty(values.shape if need_values else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
    *tensors, ctx.n_heads, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(namespace: str) -> Any:
    """Backward of a namespace's prompt_attention_shared: its second op."""

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        need_com, need_diff, need_keys, need_values, _, _ = ctx.needs_input_grad
        com, diff, keys, values = getattr(torch.ops, namespace).prompt_attention_shared_backward.default(
            *grads, *ctx.saved_tensors, ctx.n_heads, ctx.scale, need_com or need_diff, need_keys, need_values
        )
        return (
            com if need_com else None,
            diff if need_diff else None,
            keys if need_keys else None,
            values if need_values else None,
            None,
            None,
        )

    return backward


def _complete(namespace: str) -> None:
    """Fake kernels and autograd of the two ops of a namespace."""
    torch.library.register_fake(f"{namespace}::prompt_attention_shared", _fake)
    torch.library.register_fake(f"{namespace}::prompt_attention_shared_backward", _fake_backward)
    torch.library.register_autograd(f"{namespace}::prompt_attention_shared", _gradients(namespace), setup_context=_save)
    differentiable_once(OP, f"{namespace}::prompt_attention_shared_backward")


def _triton_forward(*args: Any) -> Four:
    from capt.kernels import prompt_attention as kernels

    results: Four = kernels.prompt_attention_shared(*args)
    return results


def _triton_backward(*args: Any) -> Four:
    from capt.kernels import prompt_attention as kernels

    gradients: Four = kernels.prompt_attention_shared_backward(*args)
    return gradients


def _define_triton() -> None:
    """capt_triton::prompt_attention_shared*: the schemas of csrc/torch/prompt_attention.cpp, run by Triton."""
    inputs = "Tensor commonality_query, Tensor difference_query, Tensor keys, Tensor values"
    four = "(Tensor, Tensor, Tensor, Tensor)"
    torch.library.define("capt_triton::prompt_attention_shared", f"({inputs}, int n_heads, float scale) -> {four}")
    torch.library.define(
        "capt_triton::prompt_attention_shared_backward",
        f"(Tensor grad_com, Tensor grad_diff, Tensor grad_lse_com, Tensor grad_lse_diff, {inputs}, Tensor out_com, "
        "Tensor out_diff, Tensor lse_com, Tensor lse_diff, int n_heads, float scale, bool need_query, bool need_keys, "
        f"bool need_values) -> {four}",
    )
    torch.library.impl("capt_triton::prompt_attention_shared", "cuda", _triton_forward)
    torch.library.impl("capt_triton::prompt_attention_shared_backward", "cuda", _triton_backward)
    _complete("capt_triton")


if NATIVE.loaded:
    _complete("capt")
if HAS_TRITON:
    _define_triton()
