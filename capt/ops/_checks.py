"""Argument checks shared by the ops: each failure names the argument, what was found and what is expected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from capt.errors import CaptError

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(condition: bool, message: str) -> None:
    """Raise CaptError(message) unless the condition holds."""
    if not condition:
        raise CaptError(message)


def check_tensor(op: str, name: str, value: Tensor, shape: tuple[int | str, ...]) -> None:
    """``shape`` holds numbers to be met and letters that stand for any size."""
    check(isinstance(value, Tensor), f"{op}: {name} must be a torch.Tensor, found {type(value).__name__}")
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


def check_index_range(op: str, name: str, value: Tensor, low: int, high: int) -> None:
    """Entries in [low, high). Read only on the CPU: on a GPU the test would stall the stream."""
    if value.device.type != "cpu" or value.numel() == 0 or torch.compiler.is_compiling():
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(value))
    if smallest < low or largest >= high:
        raise CaptError(f"{op}: {name} must lie in [{low}, {high}), found values from {smallest} to {largest}")


def check_count(op: str, name: str, value: int, low: int = 1) -> None:
    """``value`` is an integer of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise CaptError(f"{op}: {name} must be an integer of at least {low}, found {value!r}")


def differentiable_once(op: str, backward: str) -> None:
    """Make derivatives of a backward op (``namespace::name``) raise: without autograd they would silently be zero."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise CaptError(
            f"{op}: the kernels are differentiable once, but the gradient of a gradient was asked for; "
            "use backend='reference' for higher derivatives"
        )

    torch.library.register_autograd(backward, refuse)
