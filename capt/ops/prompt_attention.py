"""Attention over commonality and difference prompts, both streams in one call.

Reading order: public function, plan (which backend and why), argument checks, registration of the torch ops.
``capt::prompt_attention`` and its backward are defined in csrc/torch/prompt_attention.cpp; those of Triton have its
schema in the namespace ``capt_triton``. The form with keys shared by all prompts is in prompt_attention_shared.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from capt import reference
from capt.ops._checks import (
    check_float,
    check_index_range,
    check_integer,
    check_number,
    check_same_device,
    check_tensor,
    differentiable_once,
    tangent_obstacles,
)
from capt.ops._plan import HAS_TRITON, NATIVE, Dispatch, Plan, slow_half

OP = "prompt_attention"
#: No measured CPU shape is slower than the best eager form (docs/kernels/prompt_attention.md).
DISPATCH = Dispatch(
    OP,
    {
        "cpu": "rows are read in place, where eager code copies them first (docs/kernels/prompt_attention.md)",
        "cuda": "compiled CUDA kernels are present",
        "triton": "no compiled CUDA kernels in this build, Triton is installed",
    },
)


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

    Returns (h_commonality, h_difference), [B, d] in the query's dtype; an image without any row gets zeros. 16-bit
    inputs are summed in float32. Differentiable once in query, tables and log_prior; bitwise repeatable, on the CPU for
    any number of threads. Source: ours, after CAPT's guidance prompts. Raises CaptError, also when ``backend`` is
    forced and cannot run.
    """
    _check_arguments(query, commonality, difference, commonality_index, difference_index, log_prior)
    scale = max(query.shape[1], 1) ** -0.5 if scale is None else check_number(OP, "scale", scale)
    dtype = query.dtype
    if commonality.dtype != dtype or difference.dtype != dtype:  # float64 has no kernel, and float32 holds the others
        double = torch.float64 in (dtype, commonality.dtype, difference.dtype)
        dtype = torch.float64 if double else torch.float32
    tangents = tangent_obstacles(query, commonality, difference, log_prior)
    chosen, _ = DISPATCH.choose(query.device.type, dtype, backend, {"cpu": slow_half(dtype)}, tangents)
    if chosen == "reference":
        return reference.prompt_attention(
            query, commonality, difference, commonality_index, difference_index, log_prior, scale
        )
    op = torch.ops.capt_triton.prompt_attention if chosen == "triton" else torch.ops.capt.prompt_attention
    out_commonality, out_difference, _, _ = op.default(
        query.to(dtype),
        commonality.to(dtype),
        difference.to(dtype),
        commonality_index,
        difference_index,
        None if log_prior is None else log_prior.float(),
        scale,
    )
    return out_commonality.to(query.dtype), out_difference.to(query.dtype)


def plan(
    *,
    batch: int,
    k: int,
    rows: tuple[int, int],
    dim: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str | None = None,
) -> Plan:
    """The backend a forward call of this size would take, why, and its compulsory traffic and arithmetic.

    rows: prompt rows of a pair, (s, s'). Traffic counts every row once per image that asks for it.
    """
    place = torch.device(device).type
    against = {"cpu": slow_half(dtype)}
    chosen, reason = DISPATCH.choose(place, dtype, backend, against)
    gathered = batch * k * sum(rows)
    traffic = (gathered + 3 * batch) * dim * dtype.itemsize + 2 * batch * k * 8 + gathered * 4
    return Plan(OP, chosen, reason, traffic, 4 * gathered * dim, DISPATCH.rejected(place, dtype, against))


def _check_arguments(
    query: Tensor,
    commonality: Tensor,
    difference: Tensor,
    commonality_index: Tensor,
    difference_index: Tensor,
    log_prior: Tensor | None,
) -> None:
    check_tensor(OP, "query", query, ("B", "d"))
    batch, dim = query.shape
    check_tensor(OP, "commonality", commonality, ("n", "s", dim))
    check_tensor(OP, "difference", difference, ("n", "s", dim))
    check_tensor(OP, "commonality_index", commonality_index, (batch, "k"))
    check_tensor(OP, "difference_index", difference_index, (batch, commonality_index.shape[1]))
    if log_prior is not None:
        check_tensor(OP, "log_prior", log_prior, tuple(commonality_index.shape))
    check_float(OP, query=query, commonality=commonality, difference=difference, log_prior=log_prior)
    check_integer(OP, commonality_index=commonality_index, difference_index=difference_index)
    check_index_range(OP, "commonality_index", commonality_index, -1, commonality.shape[0])
    check_index_range(OP, "difference_index", difference_index, -1, difference.shape[0])
    check_same_device(
        OP,
        query=query,
        commonality=commonality,
        difference=difference,
        commonality_index=commonality_index,
        difference_index=difference_index,
        log_prior=log_prior,
    )


# ---- registration ------------------------------------------------------------------------------------------------

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _fake(
    query: Tensor,
    commonality: Tensor,
    difference: Tensor,
    commonality_index: Tensor,
    difference_index: Tensor,
    log_prior: Tensor | None,
    scale: float,
) -> Four:
    torch._check(query.dim() == 2, lambda: "capt::prompt_attention: query must be [B, d]")
    torch._check(
        query.dtype == commonality.dtype == difference.dtype,
        lambda: "capt::prompt_attention: tables must be [n, s, d] of the query's dtype",
    )
    batch, k = commonality_index.shape

    def weight(table: Tensor) -> Tensor:
        return query.new_empty((batch, k, table.shape[1]), dtype=torch.float32)

    return query.new_empty(query.shape), query.new_empty(query.shape), weight(commonality), weight(difference)


def _fake_backward(
    grad_commonality: Tensor,
    grad_difference: Tensor,
    query: Tensor,
    commonality: Tensor,
    difference: Tensor,
    commonality_index: Tensor,
    difference_index: Tensor,
    log_prior: Tensor | None,
    scale: float,
    weight_commonality: Tensor,
    weight_difference: Tensor,
    need_query: bool,
    need_tables: bool,
    need_prior: bool,
) -> Four:
    return (
        query.new_empty(query.shape if need_query else 0),
        query.new_empty(commonality.shape if need_tables else 0),
        query.new_empty(difference.shape if need_tables else 0),
        query.new_empty(commonality_index.shape if need_prior else 0, dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*tensors, *output[2:])


def _gradients(namespace: str) -> Any:
    """Backward of a namespace's prompt_attention: its second op."""

    def backward(ctx: Any, grad_commonality: Tensor, grad_difference: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        *inputs, weight_commonality, weight_difference = ctx.saved_tensors
        need_query, need_commonality, need_difference, _, _, need_prior, _ = ctx.needs_input_grad
        query, commonality, difference, prior = getattr(torch.ops, namespace).prompt_attention_backward.default(
            grad_commonality,
            grad_difference,
            *inputs,
            ctx.scale,
            weight_commonality,
            weight_difference,
            need_query,
            need_commonality or need_difference,
            need_prior,
        )
        return (
            query if need_query else None,
            commonality if need_commonality else None,
            difference if need_difference else None,
            None,
            None,
            prior if need_prior else None,
            None,
        )

    return backward


def _complete(namespace: str) -> None:
    """Fake kernels and autograd of the two ops of a namespace."""
    torch.library.register_fake(f"{namespace}::prompt_attention", _fake)
    torch.library.register_fake(f"{namespace}::prompt_attention_backward", _fake_backward)
    torch.library.register_autograd(f"{namespace}::prompt_attention", _gradients(namespace), setup_context=_save)
    differentiable_once(OP, f"{namespace}::prompt_attention_backward")


def _triton_forward(*args: Any) -> Four:
    from capt.kernels import prompt_attention as kernels

    results: Four = kernels.prompt_attention(*args)
    return results


def _triton_backward(*args: Any) -> Four:
    from capt.kernels import prompt_attention as kernels

    gradients: Four = kernels.prompt_attention_backward(*args)
    return gradients


def _define_triton() -> None:
    """capt_triton::prompt_attention*: the schemas of csrc/torch/prompt_attention.cpp, run by Triton."""
    inputs = (
        "Tensor query, Tensor commonality, Tensor difference, Tensor commonality_index, Tensor difference_index, "
        "Tensor? log_prior, float scale"
    )
    torch.library.define("capt_triton::prompt_attention", f"({inputs}) -> (Tensor, Tensor, Tensor, Tensor)")
    torch.library.define(
        "capt_triton::prompt_attention_backward",
        f"(Tensor grad_commonality, Tensor grad_difference, {inputs}, Tensor weight_commonality, "
        "Tensor weight_difference, bool need_query, bool need_tables, bool need_prior) -> "
        "(Tensor, Tensor, Tensor, Tensor)",
    )
    torch.library.impl("capt_triton::prompt_attention", "cuda", _triton_forward)
    torch.library.impl("capt_triton::prompt_attention_backward", "cuda", _triton_backward)
    _complete("capt_triton")


if NATIVE.loaded:
    _complete("capt")
if HAS_TRITON:
    _define_triton()
