"""One query's attention, accumulated per group of keys under several key biases.

The native op ``capt::attention_readout`` is defined in csrc/torch/attention_readout.cpp; the Triton one has the same
schema in the namespace ``capt_triton``. The gradient of both is a closed form in torch's operations: the op is made for
analyses without gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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
    tangent_obstacles,
)
from capt.ops._plan import HAS_TRITON, NATIVE, Dispatch, Plan, slow_half

OP = "attention_readout"
DISPATCH = Dispatch(
    OP,
    {
        "cpu": "keys and values are read once for all biases (docs/kernels/attention_readout.md)",
        "triton": "keys and values are read once for all biases; the op has no CUDA C++ kernel",
    },
)


class AttentionReadout(NamedTuple):
    """mean [M, B, H, G, dh]: attention-weighted mean value of each group (zeros for an empty group).

    log_mass [M, B, H, G]: log of the summed exponentials of each group (-inf for an empty group); its softmax over G
    is the attention share of each group, and ``(share[..., None] * mean).sum(-2)`` is ordinary attention.
    """

    mean: Tensor
    log_mass: Tensor


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
    scaled scores (M = 1 without it); -inf forbids a key; scale defaults to dh**-0.5.

    Every re-weighting that acts on whole groups is a weighted sum of ``mean`` with weights made from ``log_mass``, so
    no attention row needs to be written. Results in float32 (float64 for float64); a group without keys, or with
    nothing but forbidden ones, is empty. Differentiable any number of times in query, keys, values and bias. Bitwise
    repeatable, on the CPU for any number of threads. Inputs with contiguous channels are read in place. Source: ours,
    for the center-bias study. Raises CaptError, also when ``backend`` is forced and cannot run.
    """
    n_groups = _checked_groups(query, keys, values, groups, n_groups, bias)
    scale = max(keys.shape[3], 1) ** -0.5 if scale is None else check_number(OP, "scale", scale)
    inputs = (query, keys, values)
    dtype = keys.dtype
    if any(value.dtype != dtype for value in inputs):  # float64 has no kernel, and float32 holds the others
        double = any(value.dtype == torch.float64 for value in inputs)
        dtype = torch.float64 if double else torch.float32
    obstacles = tangent_obstacles(*inputs, bias)
    chosen, _ = DISPATCH.choose(keys.device.type, dtype, backend, {"cpu": slow_half(dtype)}, obstacles)
    if chosen == "reference":
        return AttentionReadout(*reference.attention_readout(*inputs, groups, n_groups, bias, scale))
    namespace = torch.ops.capt_triton if chosen == "triton" else torch.ops.capt
    bias = None if bias is None else bias.float()
    op = namespace.attention_readout.default
    return AttentionReadout(*op(*(value.to(dtype) for value in inputs), groups, n_groups, bias, scale))


def plan(
    *,
    batch: int,
    length: int,
    n_heads: int,
    head_dim: int,
    n_groups: int,
    n_biases: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str | None = None,
) -> Plan:
    """The backend of a call of this size, why, and its compulsory traffic and arithmetic (no two keys share biases)."""
    place = torch.device(device).type
    against = {"cpu": slow_half(dtype)}
    chosen, reason = DISPATCH.choose(place, dtype, backend, against)
    heads = batch * n_heads
    traffic = 2 * heads * length * head_dim * dtype.itemsize + 4 * n_biases * heads * n_groups * (head_dim + 1)
    flops = 2 * heads * length * head_dim * (1 + n_biases)
    return Plan(OP, chosen, reason, traffic, flops, DISPATCH.rejected(place, dtype, against))


def _checked_groups(
    query: Tensor, keys: Tensor, values: Tensor, groups: Tensor, n_groups: int, bias: Tensor | None
) -> int:
    """n_groups as an int of Python, if all arguments fit."""
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
    return n_groups


# ---- registration ------------------------------------------------------------------------------------------------

Two = tuple[Tensor, Tensor]


def _fake(
    query: Tensor, keys: Tensor, values: Tensor, groups: Tensor, n_groups: int, bias: Tensor | None, scale: float
) -> Two:
    torch._check(
        query.dtype == keys.dtype == values.dtype,
        lambda: "capt::attention_readout: query, keys and values must have one dtype",
    )
    batch, _, n_heads, head_dim = keys.shape
    shape = (1 if bias is None else bias.shape[0], batch, n_heads, n_groups)
    return keys.new_empty((*shape, head_dim), dtype=torch.float32), keys.new_empty(shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Two) -> None:
    query, keys, values, groups, ctx.n_groups, bias, ctx.scale = inputs
    ctx.save_for_backward(query, keys, values, groups, bias, *output)


@reference.own_precision
def _gradients(ctx: Any, grad_mean: Tensor, grad_log_mass: Tensor) -> tuple[Tensor | None, ...]:
    """With p a key's weight in its group: ds = p (<dmean, value> - <dmean, mean> + dlog_mass), dvalue = p dmean."""
    query, keys, values, groups, bias, mean, log_mass = ctx.saved_tensors
    batch = len(keys)
    wide = [value.float() for value in (query.expand(batch, -1, -1), keys, values)]
    score = (torch.einsum("bhc,blhc->bhl", wide[0], wide[1]) * ctx.scale)[None]
    if bias is not None:
        score = score + bias[:, None]
    place = groups.expand(batch, -1)[None, :, None].expand_as(score)
    mass = log_mass.gather(-1, place)
    weight = (score - mass.masked_fill(mass == float("-inf"), 0.0)).exp()  # of a key in an empty group: exp(-inf)
    constant = grad_log_mass - (grad_mean * mean).sum(-1)
    along = torch.einsum("mbhgc,blhc->mbhgl", grad_mean, wide[2]) + constant[..., None]
    slope = weight * along.gather(3, place[:, :, :, None])[:, :, :, 0]
    total = slope.sum(0)
    need_query, need_keys, need_values, _, _, need_bias, _ = ctx.needs_input_grad
    found: list[Tensor | None] = [None] * 7
    if need_query:
        step = torch.einsum("bhl,blhc->bhc", total, wide[1]) * ctx.scale
        found[0] = (step.sum(0) if query.dim() == 2 else step).to(query.dtype)
    if need_keys:
        found[1] = (torch.einsum("bhl,bhc->blhc", total, wide[0]) * ctx.scale).to(keys.dtype)
    if need_values:
        member = F.one_hot(groups.expand(batch, -1), ctx.n_groups).movedim(-1, 1)  # [B, G, L]
        split = weight[:, :, :, None] * member[None, :, None]
        found[2] = torch.einsum("mbhgl,mbhgc->blhc", split, grad_mean).to(values.dtype)
    if need_bias and bias is not None:
        of_heads = slope.sum(1)
        found[5] = of_heads.sum(1, keepdim=True) if bias.shape[1] == 1 else of_heads
    return tuple(found)


def _complete(namespace: str) -> None:
    """Fake kernel and autograd of a namespace's op."""
    torch.library.register_fake(f"{namespace}::attention_readout", _fake)
    torch.library.register_autograd(f"{namespace}::attention_readout", _gradients, setup_context=_save)


def _triton(*args: Any) -> Two:
    from capt.kernels import attention_readout as kernels

    found: Two = kernels.attention_readout(*args)
    return found


def _define_triton() -> None:
    """capt_triton::attention_readout: the schema of csrc/torch/attention_readout.cpp, run by Triton."""
    torch.library.define(
        "capt_triton::attention_readout",
        "(Tensor query, Tensor keys, Tensor values, Tensor groups, int n_groups, Tensor? bias, float scale) "
        "-> (Tensor mean, Tensor log_mass)",
    )
    torch.library.impl("capt_triton::attention_readout", "cuda", _triton)
    _complete("capt_triton")


if NATIVE.loaded:
    _complete("capt")
if HAS_TRITON:
    _define_triton()
