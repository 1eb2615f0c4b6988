"""Depth-wise 3x3 adapter on the patch grid, in token layout.

Reading order: public function, plan (which backend and why), argument checks, registration of the torch ops.
The native ops ``capt::grid_adapter`` and ``capt::grid_adapter_correlate`` are defined in csrc/torch/grid_adapter.cpp;
the Triton ones have the same schema in the namespace ``capt_triton``.
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

OP = "grid_adapter"
#: No measured CPU shape is slower than the best convolution of torch (docs/kernels/grid_adapter.md).
DISPATCH = Dispatch(
    OP,
    {
        "cpu": "one pass in token layout, where torch's convolution needs layout copies (docs/kernels/grid_adapter.md)",
        "cuda": "compiled CUDA kernels are present",
        "triton": "no compiled CUDA kernels in this build, Triton is installed",
    },
)


def grid_adapter(
    tokens: Tensor,
    weight: Tensor,
    *,
    alpha: Tensor | float = 1.0,
    grid: tuple[int, int],
    n_prefix: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Add ``alpha`` times a depth-wise 3x3 convolution over the patch grid to the patch tokens.

    tokens [B, L, D] with L >= n_prefix + H*W: n_prefix tokens (class token, prompts), then the H x W grid row by row,
    then any further tokens; only grid tokens change. weight [D, 3, 3], zero padding, no bias. alpha: a number, a
    tensor with one entry, or [B] (one per image). grid (H, W).

    Returns [B, L, D] in the dtype of tokens; 16-bit inputs are accumulated in float32. Weight and alpha may be
    float32 beside 16-bit tokens. Differentiable once in tokens, weight and alpha; bitwise repeatable on every backend.
    Tokens with contiguous channels are read in place, others are copied once.

    Source: CAPT paper, Eq. 10 (Diff-Manner Adapter). Raises CaptError, also when ``backend`` is forced and cannot run.

    >>> import torch
    >>> tokens, weight = torch.ones(2, 1 + 4, 8), torch.zeros(8, 3, 3)
    >>> bool((grid_adapter(tokens, weight, grid=(2, 2), n_prefix=1) == tokens).all())
    True
    """
    alpha, grid, n_prefix = _checked(tokens, weight, alpha, grid, n_prefix)
    chosen, _ = DISPATCH.choose(
        tokens.device.type,
        tokens.dtype,
        backend,
        {"cpu": slow_half(tokens.dtype)},
        tangent_obstacles(tokens, weight, alpha),
    )
    if chosen == "reference":
        return reference.grid_adapter(tokens, weight, alpha, grid, n_prefix)
    factor, scale = None, 1.0
    if isinstance(alpha, Tensor):
        # contiguous() after reshape: an expanded alpha would otherwise keep stride 0
        factor = alpha.float().reshape(-1).contiguous()
    else:
        scale = alpha
    op = torch.ops.capt_triton.grid_adapter if chosen == "triton" else torch.ops.capt.grid_adapter
    out: Tensor = op(tokens, weight.float().contiguous(), factor, scale, grid[0], grid[1], n_prefix, False)
    return out


def plan(
    *,
    batch: int,
    grid: tuple[int, int],
    dim: int,
    n_prefix: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str | None = None,
) -> Plan:
    """The backend a forward call of this size would take, why, and its compulsory traffic and arithmetic."""
    place = torch.device(device).type
    against = {"cpu": slow_half(dtype)}
    chosen, reason = DISPATCH.choose(place, dtype, backend, against)
    traffic = 2 * batch * (n_prefix + grid[0] * grid[1]) * dim * dtype.itemsize + 9 * dim * 4
    return Plan(
        OP, chosen, reason, traffic, batch * grid[0] * grid[1] * dim * 20, DISPATCH.rejected(place, dtype, against)
    )


def _checked(
    tokens: Tensor, weight: Tensor, alpha: Tensor | float, grid: tuple[int, int], n_prefix: int
) -> tuple[Tensor | float, tuple[int, int], int]:
    """alpha, grid and n_prefix as numbers of Python, if all arguments fit."""
    check_tensor(OP, "tokens", tokens, ("B", "L", "D"))
    batch, length, dim = tokens.shape
    check_tensor(OP, "weight", weight, (dim, 3, 3))
    check_float(OP, tokens=tokens, weight=weight, alpha=alpha if isinstance(alpha, Tensor) else None)
    pair = isinstance(grid, tuple | list | torch.Size) and len(grid) == 2
    if not pair:
        raise CaptError(f"{OP}: grid must be (height, width), found {grid!r}")
    height, width = check_count(OP, "grid height", grid[0]), check_count(OP, "grid width", grid[1])
    n_prefix = check_count(OP, "n_prefix", n_prefix, low=0)
    if n_prefix + height * width > length:
        raise CaptError(
            f"{OP}: tokens has {length} tokens, but {n_prefix} prefix tokens and a {height}x{width} grid need at least "
            f"{n_prefix + height * width}; pass the grid of this image size"
        )
    if not isinstance(alpha, Tensor):
        check_same_device(OP, tokens=tokens, weight=weight)
        return check_number(OP, "alpha", alpha), (height, width), n_prefix
    one = alpha.numel() == 1 and alpha.dim() <= 1
    if not one and tuple(alpha.shape) != (batch,):
        found = list(alpha.shape)
        raise CaptError(f"{OP}: alpha must be a number, a tensor with one entry or [{batch}], found {found}")
    check_tensor(OP, "alpha", alpha, tuple(alpha.shape))
    check_same_device(OP, tokens=tokens, weight=weight, alpha=alpha)
    return alpha, (height, width), n_prefix


# ---- registration ------------------------------------------------------------------------------------------------


def _fake_adapter(
    tokens: Tensor,
    weight: Tensor,
    alpha: Tensor | None,
    scale: float,
    height: int,
    width: int,
    n_prefix: int,
    transpose: bool,
) -> Tensor:
    torch._check(tokens.dim() == 3, lambda: "capt::grid_adapter: tokens must be [B, L, D]")
    torch._check(weight.dtype == torch.float32, lambda: "capt::grid_adapter: weight must be float32")
    torch._check(n_prefix + height * width <= tokens.shape[1], lambda: "capt::grid_adapter: the grid does not fit")
    return tokens.new_empty(tokens.shape)


def _fake_correlate(tokens: Tensor, grad: Tensor, height: int, width: int, n_prefix: int) -> Tensor:
    torch._check(tokens.dtype == grad.dtype, lambda: "capt::grid_adapter_correlate: tokens and grad differ in dtype")
    return tokens.new_empty((tokens.shape[0], 9, tokens.shape[2]), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weight, alpha, *ctx.options = inputs
    kernel_gradient = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(tokens if kernel_gradient else None, weight, alpha)


def _gradients(namespace: str) -> Any:
    """Backward of a namespace's grid_adapter, out of its own two ops."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ops = getattr(torch.ops, namespace)
        tokens, weight, alpha = ctx.saved_tensors
        scale, height, width, n_prefix, transpose = ctx.options
        grad_tokens = grad_weight = grad_alpha = None
        if ctx.needs_input_grad[0]:
            # The gradient of a stencil is the mirrored stencil.
            grad_tokens = ops.grid_adapter(grad, weight, alpha, scale, height, width, n_prefix, not transpose)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            partial = ops.grid_adapter_correlate(tokens, grad, height, width, n_prefix) * scale  # [B, 9, D]
            if transpose:
                partial = partial.flip(1)
            if ctx.needs_input_grad[1]:
                mixed = partial if alpha is None else partial * alpha.reshape(-1, 1, 1)
                grad_weight = mixed.sum(0).t().reshape(weight.shape)
            if ctx.needs_input_grad[2]:
                per_image = (partial * weight.reshape(-1, 9).t()).sum((1, 2))
                grad_alpha = (per_image if alpha.numel() == len(per_image) else per_image.sum()).reshape(alpha.shape)
        return grad_tokens, grad_weight, grad_alpha, None, None, None, None, None

    return backward


def _complete(namespace: str) -> None:
    """Fake kernels and autograd of the two ops of a namespace."""
    torch.library.register_fake(f"{namespace}::grid_adapter", _fake_adapter)
    torch.library.register_fake(f"{namespace}::grid_adapter_correlate", _fake_correlate)
    torch.library.register_autograd(f"{namespace}::grid_adapter", _gradients(namespace), setup_context=_save)
    differentiable_once(OP, f"{namespace}::grid_adapter_correlate")


def _triton_adapter(*args: Any) -> Tensor:
    from capt.kernels import grid_adapter as kernels

    out: Tensor = kernels.grid_adapter(*args)
    return out


def _triton_correlate(*args: Any) -> Tensor:
    from capt.kernels import grid_adapter as kernels

    partial: Tensor = kernels.grid_adapter_correlate(*args)
    return partial


def _define_triton() -> None:
    """capt_triton::grid_adapter*: the schemas of csrc/torch/grid_adapter.cpp, run by Triton."""
    torch.library.define(
        "capt_triton::grid_adapter",
        "(Tensor tokens, Tensor weight, Tensor? alpha, float scale, int height, int width, int n_prefix, "
        "bool transpose) -> Tensor",
    )
    torch.library.define(
        "capt_triton::grid_adapter_correlate",
        "(Tensor tokens, Tensor grad, int height, int width, int n_prefix) -> Tensor",
    )
    torch.library.impl("capt_triton::grid_adapter", "cuda", _triton_adapter)
    torch.library.impl("capt_triton::grid_adapter_correlate", "cuda", _triton_correlate)
    _complete("capt_triton")


if NATIVE.loaded:
    _complete("capt")
if HAS_TRITON:
    _define_triton()
