"""Asymmetric multi-label loss.

The native op ``capt::asymmetric_loss`` is defined in csrc/torch/asymmetric_loss.cpp; the Triton one has the same schema
in the namespace ``capt_triton``. Both return the slope beside the loss, so that the backward is one product. There is
no CUDA C++ kernel: every entry is visited once, which Triton does as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from capt import reference
from capt.errors import CaptError
from capt.ops._checks import (
    check_float,
    check_number,
    check_same_device,
    check_tensor,
    readable,
    second_derivative,
    tangent_obstacles,
)
from capt.ops._plan import HAS_TRITON, NATIVE, Dispatch, Plan, slow_half

OP = "asymmetric_loss"
DISPATCH = Dispatch(
    OP,
    {
        "cpu": "loss and gradient in one visit of each entry (docs/kernels/asymmetric_loss.md)",
        "triton": "loss and gradient in one visit of each entry; the op has no CUDA C++ kernel",
    },
)
#: In the order of torch's own enumeration.
REDUCTIONS = ("none", "mean", "sum")


def asymmetric_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    gamma_pos: float = 0.0,
    gamma_neg: float = 4.0,
    margin: float = 0.05,
    eps: float = 1e-8,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Binary cross-entropy in which easy negatives fade out.

    logits [B, C] floating; targets [B, C], zero or one in any dtype. With p = sigmoid(logit) and
    p_m = max(p - margin, 0): positives cost ``(1-p)**gamma_pos * -log p``, negatives
    ``p_m**gamma_neg * -log(1 - p_m)``; the focal factors are constants for the gradient. Logarithms are cut off at
    log eps, where the gradient ends, too; eps = 0: never. reduction: "mean" over all entries, "sum" or "none" ([B, C]).

    The result is float32 (float64 for float64 logits). Differentiable once in logits; bitwise repeatable on every
    backend, whatever the number of threads. Source: the loss CPRFL trains with. Raises CaptError, also when ``backend``
    is forced and cannot run.

    >>> import torch
    >>> round(float(asymmetric_loss(torch.tensor([[0.0, -3.0]]), torch.tensor([[True, False]]), reduction="sum")), 4)
    0.6931
    """
    gamma_pos, gamma_neg = check_number(OP, "gamma_pos", gamma_pos), check_number(OP, "gamma_neg", gamma_neg)
    margin, eps = check_number(OP, "margin", margin), check_number(OP, "eps", eps)
    _check_arguments(logits, targets, gamma_pos, gamma_neg, margin, eps, reduction)
    chosen, _ = DISPATCH.choose(
        logits.device.type, logits.dtype, backend, {"cpu": slow_half(logits.dtype)}, tangent_obstacles(logits)
    )
    if chosen == "reference":
        return reference.asymmetric_loss(logits, targets, gamma_pos, gamma_neg, margin, eps, reduction)
    if targets.dtype not in (torch.bool, torch.uint8, torch.float32):
        targets = targets.float()
    op = (torch.ops.capt_triton if chosen == "triton" else torch.ops.capt).asymmetric_loss.default
    arguments = (logits, targets, gamma_pos, gamma_neg, margin, eps, REDUCTIONS.index(reduction))
    plain = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    loss: Tensor = _Direct.apply(op, *arguments) if plain else op(*arguments)[0]
    return loss


def plan(
    *,
    batch: int,
    n_classes: int,
    reduction: str = "mean",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str | None = None,
) -> Plan:
    """The backend of a call of this size, why, and its compulsory traffic (8-bit targets) and arithmetic."""
    place = torch.device(device).type
    against = {"cpu": slow_half(dtype)}
    chosen, reason = DISPATCH.choose(place, dtype, backend, against)
    entries = batch * n_classes
    # The slope is float32. An exponential and a logarithm (22 each), two divisions, and what combines them.
    traffic = entries * (dtype.itemsize + 1 + 4 + (4 if reduction == "none" else 0))
    return Plan(OP, chosen, reason, traffic, entries * 75, DISPATCH.rejected(place, dtype, against))


def _check_arguments(
    logits: Tensor, targets: Tensor, gamma_pos: float, gamma_neg: float, margin: float, eps: float, reduction: str
) -> None:
    check_tensor(OP, "logits", logits, ("B", "C"))
    check_tensor(OP, "targets", targets, tuple(logits.shape))
    check_float(OP, logits=logits)
    check_same_device(OP, logits=logits, targets=targets)
    if not (0 <= gamma_pos < float("inf") and 0 <= gamma_neg < float("inf")):
        raise CaptError(f"{OP}: gamma_pos and gamma_neg must be finite and >= 0, found {gamma_pos} and {gamma_neg}")
    for name, value in (("margin", margin), ("eps", eps)):
        if not 0.0 <= value < 1.0:
            raise CaptError(f"{OP}: {name} must lie in [0, 1), found {value}")
    if reduction not in REDUCTIONS:
        raise CaptError(f"{OP}: reduction must be mean, sum or none, found '{reduction}'")
    if targets.dtype != torch.bool and readable(targets):
        low, high = (float(bound) for bound in torch.aminmax(targets))
        if not (low >= 0 and high <= 1) or (targets.is_floating_point() and not torch.equal(targets, targets.ceil())):
            raise CaptError(f"{OP}: targets must be zero or one, found values from {low:g} to {high:g}")


# ---- registration ------------------------------------------------------------------------------------------------


def _fake(
    logits: Tensor, targets: Tensor, gamma_pos: float, gamma_neg: float, margin: float, eps: float, reduction: int
) -> tuple[Tensor, Tensor]:
    torch._check(logits.dim() == 2, lambda: "capt::asymmetric_loss: logits must be [B, C]")
    loss = logits.new_empty(logits.shape if reduction == 0 else (), dtype=torch.float32)
    return loss, logits.new_empty(logits.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])


def _gradients(ctx: Any, grad: Tensor | None, grad_slope: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_slope is not None:  # only a backward through this backward asks for it
        raise second_derivative(OP)
    (slope,) = ctx.saved_tensors
    return None if grad is None else (slope * grad).to(ctx.dtype), None, None, None, None, None, None


class _Direct(torch.autograd.Function):
    """The same, without torch.library's layer around it, which costs a small batch more than its loss.

    The backward scales the slope in place and hands it out; only if a graph is kept and used again is it formed anew.
    """

    @staticmethod
    def forward(ctx: Any, op: Any, *arguments: Any) -> Tensor:  # type: ignore[override]
        logits, targets, *ctx.rest = arguments
        ctx.op, ctx.dtype = op, logits.dtype
        ctx.save_for_backward(logits, targets)
        with torch._C._AutoDispatchBelowAutograd():
            loss, ctx.slope = op(*arguments)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():  # the graph of this backward is asked for; it has none
            raise second_derivative(OP)
        slope, ctx.slope = ctx.slope, None
        if slope is None:
            slope = ctx.op(*ctx.saved_tensors, *ctx.rest)[1]
        if grad.dim() or grad.device.type != "cpu" or grad.item() != 1:
            slope *= grad
        return None, slope.to(ctx.dtype), None, None, None, None, None, None


def _complete(namespace: str) -> None:
    """Fake kernel and autograd of a namespace's op."""
    torch.library.register_fake(f"{namespace}::asymmetric_loss", _fake)
    torch.library.register_autograd(f"{namespace}::asymmetric_loss", _gradients, setup_context=_save)


def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    from capt.kernels import asymmetric_loss as kernels

    found: tuple[Tensor, Tensor] = kernels.asymmetric_loss(*args)
    return found


def _define_triton() -> None:
    """capt_triton::asymmetric_loss: the schema of csrc/torch/asymmetric_loss.cpp, run by Triton."""
    torch.library.define(
        "capt_triton::asymmetric_loss",
        "(Tensor logits, Tensor targets, float gamma_pos, float gamma_neg, float margin, float eps, int reduction) "
        "-> (Tensor loss, Tensor slope)",
    )
    torch.library.impl("capt_triton::asymmetric_loss", "cuda", _triton)
    _complete("capt_triton")


if NATIVE.loaded:
    _complete("capt")
if HAS_TRITON:
    _define_triton()
