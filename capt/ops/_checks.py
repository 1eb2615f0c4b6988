"""Argument checks shared by the ops: each failure names the argument, what was found and what is expected."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from capt.errors import CaptError

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(op: str, name: str, value: Tensor, shape: tuple[int | str, ...]) -> None:
    """``shape`` holds numbers to be met and letters that stand for any size."""
    if not isinstance(value, Tensor):
        raise CaptError(f"{op}: {name} must be a torch.Tensor, found {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        raise CaptError(f"{op}: {name} must be a dense tensor, found {value.layout}; call .to_dense()")
    found = tuple(value.shape)
    fits = len(found) == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, found, strict=True)
    )
    if not fits:
        expected = ", ".join(str(size) for size in shape)
        raise CaptError(f"{op}: {name} must have shape [{expected}], found {list(found)}")


def check_float(op: str, **tensors: Tensor | None) -> None:
    """Every given tensor has a floating dtype of ``FLOAT_DTYPES``."""
    for name, value in tensors.items():
        if value is not None and value.dtype not in FLOAT_DTYPES:
            raise CaptError(f"{op}: {name} must be float16, bfloat16, float32 or float64, found {value.dtype}")


def check_integer(op: str, **tensors: Tensor | None) -> None:
    """Every given tensor is int64."""
    for name, value in tensors.items():
        if value is not None and value.dtype != torch.int64:
            raise CaptError(f"{op}: {name} must be int64, found {value.dtype}; call .long()")


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """Every given tensor lies on one device."""
    places = {name: value.device for name, value in tensors.items() if value is not None}
    if len(set(places.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in places.items())
        raise CaptError(f"{op}: all tensors must be on one device, found {found}")


def readable(value: Tensor) -> bool:
    """Whether a check may look at the entries: they exist, and lie on the CPU (on a GPU it would stall the stream)."""
    if torch.compiler.is_compiling() or value.device.type != "cpu" or value.numel() == 0:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return False
    modes = torch._C._TorchDispatchModeKey  # type: ignore[attr-defined]
    return all(torch._C._get_dispatch_mode(key) is None for key in (modes.FAKE, modes.PROXY))  # type: ignore[attr-defined]


def check_index_range(op: str, name: str, value: Tensor, low: int, high: int) -> None:
    """Entries in [low, high), where they are readable."""
    if not readable(value):
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(value))
    if smallest < low or largest >= high:
        raise CaptError(f"{op}: {name} must lie in [{low}, {high}), found values from {smallest} to {largest}")


def check_count(op: str, name: str, value: int, low: int = 1) -> int:
    """``value`` as an int, if it is an integer (of Python or NumPy) of at least ``low``."""
    count: int | None = None
    if isinstance(value, int | torch.SymInt):
        count = None if isinstance(value, bool) else value
    elif not isinstance(value, Tensor) and hasattr(value, "__index__"):
        count = operator.index(value)
    if count is None or count < low:
        raise CaptError(f"{op}: {name} must be an integer of at least {low}, found {value!r}")
    return count


def check_number(op: str, name: str, value: float) -> float:
    """``value`` as a float, if it is a number."""
    if isinstance(value, float):
        return value
    try:
        if isinstance(value, str | bytes | Tensor):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise CaptError(f"{op}: {name} must be a number, found {type(value).__name__}") from error


def tangent_obstacles(*values: Any) -> dict[str, str]:
    """Why kernels cannot run if one of the tensors carries a forward-mode tangent: they would silently drop it."""
    if torch.compiler.is_compiling():
        return {}
    for value in values:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            why = "the kernels have no forward-mode derivative, which an input asks for"
            return dict.fromkeys(("cpu", "cuda", "triton"), why)
    return {}


def differentiable_once(op: str, backward: str) -> None:
    """Make derivatives of a backward op (``namespace::name``) raise: without autograd they would silently be zero."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise second_derivative(op)

    torch.library.register_autograd(backward, refuse)


def second_derivative(op: str) -> CaptError:
    """The error of a gradient of a gradient."""
    return CaptError(
        f"{op}: the kernels are differentiable once, but the gradient of a gradient was asked for; "
        "use backend='reference' for higher derivatives"
    )
