"""Router, expert networks and weighted sum of a small mixture of experts.

Reading order: public function, plan, argument checks, registration. The native ops ``capt::expert_router``,
``capt::expert_mix`` and their backwards are defined in csrc/torch/expert_gating.cpp; the Triton ones have the same
schemas in the namespace ``capt_triton``.
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

OP = "expert_gating"
CPU_EXPERTS = 512  #: CAPT_ROUTER_EXPERTS of csrc/expert_gating.h
DISPATCH = Dispatch(
    OP,
    {
        "cpu": "weights are read once and only routed tokens are computed (docs/kernels/expert_gating.md)",
        "cuda": "compiled CUDA kernels are present",
        "triton": "no compiled CUDA kernels in this build, Triton is installed",
    },
)


def expert_gating(
    x: Tensor,
    gate: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    *,
    top_k: int,
    dropout: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``y = sum_e w_e FFN_e(x)`` with ``FFN_e = W_out QuickGELU(W_in x + b_in) + b_out``.

    x [N, D]; gate [E, D]; w_in [E, H, D], b_in [E, H], w_out [E, D, H], b_out [E, D]. The router is a float32 softmax
    of ``gate x``, of which the top_k largest (ties to the lower expert) are kept and renormalised to sum 1.
    dropout acts on the hidden activation when training; its seed comes from torch's generator of the CPU, and what it
    drops depends on seed, token, expert and column alone (docs/kernels/expert_gating.md).

    Returns (y [N, D] in x's dtype, weights [N, E], probs [N, E] before the selection, load [E] = share of the rows
    that use an expert), the last three float32 (float64 for float64). Differentiable once, load excepted; gradient
    reaches the gate through the kept weights and through probs; experts that a row does not use give and receive
    exactly 0. Bitwise repeatable on every backend. Sums are formed in float32; parameters of other dtypes than x are
    widened to float32, and x with them. Source: CAPT's expert module. Raises CaptError.
    """
    top_k, dropout = _checked(x, gate, w_in, b_in, w_out, b_out, top_k, dropout)
    tensors: tuple[Tensor, ...] = (x, gate, w_in, b_in, w_out, b_out)
    obstacles = _obstacles(gate.shape[0]) | tangent_obstacles(*tensors)
    chosen, _ = DISPATCH.choose(x.device.type, x.dtype, backend, {"cpu": slow_half(x.dtype)}, obstacles)
    dropout = dropout if training else 0.0
    seed = _seed() if dropout else 0
    if chosen == "reference":
        return reference.expert_gating(x, gate, w_in, b_in, w_out, b_out, top_k, dropout, seed)
    if any(value.dtype != x.dtype for value in tensors):
        tensors = tuple(value.float() for value in tensors)
    ops = torch.ops.capt_triton if chosen == "triton" else torch.ops.capt
    weights, probs, load = ops.expert_router(tensors[0], tensors[1], top_k)
    y: Tensor = ops.expert_mix(tensors[0], weights, *tensors[2:], dropout, seed)
    return y.to(x.dtype), weights, probs, load


def _obstacles(n_experts: int) -> dict[str, str]:
    """Why kernels cannot run with this many experts."""
    return {"cpu": f"{n_experts} experts are more than {CPU_EXPERTS}"} if n_experts > CPU_EXPERTS else {}


def _seed() -> int:
    """63 random bits of torch's CPU generator, so that torch.manual_seed governs them; no GPU is waited for."""
    return int(torch.randint(torch.iinfo(torch.int64).max, ()))


def plan(
    *,
    tokens: int = 1,
    dim: int = 768,
    hidden: int | None = None,
    n_experts: int = 3,
    top_k: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str | None = None,
) -> Plan:
    """The backend a forward call of this size would take, why, and its compulsory traffic and arithmetic.

    hidden: None: 4 * dim. Every expert is assumed to be used by some token when tokens * top_k allows it.
    """
    place = torch.device(device).type
    obstacles = _obstacles(n_experts)
    against = {"cpu": slow_half(dtype)}
    chosen, reason = DISPATCH.choose(place, dtype, backend, against, obstacles)
    hidden = 4 * dim if hidden is None else hidden
    parameters = min(n_experts, tokens * top_k) * (2 * hidden * dim + hidden + dim) + n_experts * dim
    traffic = (parameters + 2 * tokens * dim) * dtype.itemsize + (2 * tokens + 1) * n_experts * 4
    flops = tokens * (2 * n_experts * dim + top_k * 4 * hidden * dim)
    return Plan(OP, chosen, reason, traffic, flops, DISPATCH.rejected(place, dtype, against | obstacles))


def _checked(
    x: Tensor, gate: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, top_k: int, dropout: float
) -> tuple[int, float]:
    """top_k and dropout as numbers of Python, if all arguments fit."""
    check_tensor(OP, "x", x, ("N", "D"))
    dim = x.shape[1]
    check_tensor(OP, "gate", gate, ("E", dim))
    n_experts = gate.shape[0]
    check_tensor(OP, "w_in", w_in, (n_experts, "H", dim))
    hidden = w_in.shape[1]
    if dim < 1 or hidden < 1:
        name, size = ("x has width", dim) if dim < 1 else ("w_in has hidden width", hidden)
        raise CaptError(f"{OP}: {name} {size}, it must be at least 1")
    check_tensor(OP, "b_in", b_in, (n_experts, hidden))
    check_tensor(OP, "w_out", w_out, (n_experts, dim, hidden))
    check_tensor(OP, "b_out", b_out, (n_experts, dim))
    check_float(OP, x=x, gate=gate, w_in=w_in, b_in=b_in, w_out=w_out, b_out=b_out)
    check_same_device(OP, x=x, gate=gate, w_in=w_in, b_in=b_in, w_out=w_out, b_out=b_out)
    top_k = check_count(OP, "top_k", top_k)
    if top_k > n_experts:
        raise CaptError(f"{OP}: top_k={top_k} exceeds the number of experts, {n_experts}")
    dropout = check_number(OP, "dropout", dropout)
    if not 0.0 <= dropout < 1.0:
        raise CaptError(f"{OP}: dropout must lie in [0, 1), found {dropout}")
    return top_k, dropout


# ---- registration ------------------------------------------------------------------------------------------------

ROUTER = "(Tensor x, Tensor gate, int top_k) -> (Tensor weights, Tensor probs, Tensor load)"
ROUTER_BACKWARD = (
    "(Tensor grad_weights, Tensor grad_probs, Tensor weights, Tensor probs, Tensor x, Tensor gate, bool need_x, "
    "bool need_gate) -> (Tensor x, Tensor gate)"
)
_MIX_INPUTS = (
    "Tensor x, Tensor weights, Tensor w_in, Tensor b_in, Tensor w_out, Tensor b_out, float dropout, SymInt seed"
)
MIX = f"({_MIX_INPUTS}) -> Tensor"
MIX_BACKWARD = (
    f"({_MIX_INPUTS}, Tensor grad_y, bool need_x, bool need_weights, bool need_w_in, bool need_b_in, bool need_w_out, "
    "bool need_b_out) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _fake_router(x: Tensor, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(x.dim() == 2 and gate.dim() == 2, lambda: "expert_router: x must be [N, D] and gate [E, D]")
    shape = x.shape[0], gate.shape[0]
    weights, probs = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return weights, probs, x.new_empty(gate.shape[:1], dtype=torch.float32)


def _gradient(like: Tensor, needed: bool) -> Tensor:
    return like.new_empty(like.shape if needed else (0,))


def _fake_router_backward(
    grad_weights: Tensor,
    grad_probs: Tensor,
    weights: Tensor,
    probs: Tensor,
    x: Tensor,
    gate: Tensor,
    need_x: bool,
    need_gate: bool,
) -> tuple[Tensor, Tensor]:
    return _gradient(x, need_x), _gradient(gate, need_gate)


def _fake_mix(
    x: Tensor,
    weights: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
    b_out: Tensor,
    dropout: float,
    seed: int,
) -> Tensor:
    torch._check(x.dtype == w_in.dtype, lambda: "expert_mix: x and the experts must have one dtype")
    return x.new_empty(x.shape)


def _fake_mix_backward(*args: Any) -> tuple[Tensor, ...]:
    return tuple(_gradient(like, needed) for like, needed in zip(args[:6], args[9:], strict=True))


def _save_router(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate, _ = inputs
    weights, probs, load = output
    ctx.mark_non_differentiable(load)
    ctx.save_for_backward(weights, probs, x, gate)


def _save_mix(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.dropout, ctx.seed = inputs
    ctx.save_for_backward(*tensors)


def _router_gradients(namespace: str) -> Any:
    def backward(ctx: Any, grad_weights: Tensor, grad_probs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        op = getattr(torch.ops, namespace).expert_router_backward
        found = op(grad_weights, grad_probs, *ctx.saved_tensors, *needs)
        return *(grad if need else None for grad, need in zip(found, needs, strict=True)), None

    return backward


def _mix_gradients(namespace: str) -> Any:
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:6]
        op = getattr(torch.ops, namespace).expert_mix_backward
        found = op(*ctx.saved_tensors, ctx.dropout, ctx.seed, grad_y, *needs)
        return *(grad if need else None for grad, need in zip(found, needs, strict=True)), None, None

    return backward


def _complete(namespace: str) -> None:
    """Fake kernels and autograd of the four ops of a namespace."""
    fakes: dict[str, Any] = {"router": _fake_router, "router_backward": _fake_router_backward, "mix": _fake_mix,
             "mix_backward": _fake_mix_backward}  # fmt: skip
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::expert_{name}", fake)
    torch.library.register_autograd(
        f"{namespace}::expert_router", _router_gradients(namespace), setup_context=_save_router
    )
    torch.library.register_autograd(f"{namespace}::expert_mix", _mix_gradients(namespace), setup_context=_save_mix)
    differentiable_once(OP, f"{namespace}::expert_router_backward")
    differentiable_once(OP, f"{namespace}::expert_mix_backward")


def _define_triton() -> None:
    """capt_triton::expert_*: the schemas of csrc/torch/expert_gating.cpp, run by Triton."""
    schemas = {"router": ROUTER, "router_backward": ROUTER_BACKWARD, "mix": MIX, "mix_backward": MIX_BACKWARD}
    for name, schema in schemas.items():
        torch.library.define(f"capt_triton::expert_{name}", schema)
        torch.library.impl(f"capt_triton::expert_{name}", "cuda", _triton(f"expert_{name}"))
    _complete("capt_triton")


def _triton(name: str) -> Any:
    """The Triton function of this name; its module is imported when it is first called."""

    def run(*args: Any) -> Any:
        from capt.kernels import expert_gating as kernels

        return getattr(kernels, name)(*args)

    return run


if NATIVE.loaded:
    _complete("capt")
if HAS_TRITON:
    _define_triton()
