"""Pseudo label and most confusable classes of each image.

The native op ``capt::confusion_pairs`` is defined in csrc/torch/confusion_pairs.cpp; the Triton one has the same schema
in the namespace ``capt_triton``. There is no CUDA C++ kernel: the op reads its logits once or twice from cache and is
bound by launches and memory, which Triton reaches as well.
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
    check_index_range,
    check_same_device,
    check_tensor,
    readable,
)
from capt.ops._plan import HAS_TRITON, NATIVE, Dispatch, Plan, slow_half

OP = "confusion_pairs"
DISPATCH = Dispatch(
    OP,
    {
        "cpu": "softmax, statistics and selection in one visit of each row (docs/kernels/confusion_pairs.md)",
        "triton": "one program a row; the op has no CUDA C++ kernel",
    },
)


def confusion_pairs(
    logits: Tensor,
    *,
    k: int,
    offsets: Tensor | None = None,
    classes: Tensor | None = None,
    counts: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score every class by how likely it is confused with the predicted one; keep the best k.

    logits [B, C], C >= 2. Statistics in compressed rows keyed by the predicted class p: offsets int64 [C+1], classes
    int64 [nnz] (no repeats in a row), counts [nnz] >= 0. With p the arg-max of a row and n its statistics,
    ``S_i = (1 + n_i / sum n) * softmax(logits)_i`` for i != p, formed in float32 (float64 for float64 logits, then
    rounded). Without statistics, or with an empty row, S is the softmax.

    Returns (pseudo int64 [B], index int64 [B, k'], score float32 [B, k']), k' = min(k, C - 1), descending, ties and
    arg-max to the lower class. A row that holds NaN, +inf or nothing but -inf has no softmax: its scores are NaN, its
    classes ascend, and its pseudo label is the last class if there is a NaN, else the first arg-max. No gradient;
    bitwise repeatable. Logits with contiguous classes are read in place, others are copied once.

    Source: CAPT paper, Eq. 7. Raises CaptError, also when ``backend`` is forced and cannot run.

    >>> import torch
    >>> pseudo, index, score = confusion_pairs(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), k=2)
    >>> pseudo.tolist(), index.tolist()
    ([1], [[3, 2]])
    """
    k = check_count(OP, "k", k)
    _check_arguments(logits, offsets, classes, counts)
    chosen, _ = DISPATCH.choose(logits.device.type, logits.dtype, backend, {"cpu": slow_half(logits.dtype)})
    if offsets is not None and classes is not None and counts is not None:
        offsets, classes = offsets.long().contiguous(), classes.long().contiguous()
    if chosen == "reference":
        return reference.confusion_pairs(logits, k, offsets, classes, counts)
    if counts is not None:
        counts = counts.detach().float().contiguous()
    op = torch.ops.capt_triton.confusion_pairs if chosen == "triton" else torch.ops.capt.confusion_pairs
    pseudo, index, score = op(logits.detach(), k, offsets, classes, counts)
    return pseudo, index, score


def plan(
    *,
    batch: int,
    n_classes: int,
    k: int = 5,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str | None = None,
) -> Plan:
    """The backend of a call of this size, why, and its compulsory traffic and arithmetic (statistics not counted)."""
    place = torch.device(device).type
    against = {"cpu": slow_half(dtype)}
    chosen, reason = DISPATCH.choose(place, dtype, backend, against)
    traffic = batch * (n_classes * dtype.itemsize + 8 + 12 * min(k, n_classes - 1))
    # A maximum, a subtraction, an exponential (22), a sum and a product a class.
    return Plan(OP, chosen, reason, traffic, batch * n_classes * 26, DISPATCH.rejected(place, dtype, against))


def _check_arguments(logits: Tensor, offsets: Tensor | None, classes: Tensor | None, counts: Tensor | None) -> None:
    check_tensor(OP, "logits", logits, ("B", "C"))
    check_float(OP, logits=logits)
    n_classes = logits.shape[1]
    if n_classes < 2:
        raise CaptError(f"{OP}: logits must have at least 2 classes, found {n_classes}")
    if n_classes >= 1 << 31:
        raise CaptError(f"{OP}: logits has {n_classes} classes, at most {(1 << 31) - 1} are supported")
    given = [value is not None for value in (offsets, classes, counts)]
    if any(given) and not all(given):
        raise CaptError(f"{OP}: offsets, classes and counts belong together; give all three or none")
    if offsets is not None and classes is not None and counts is not None:
        check_tensor(OP, "offsets", offsets, (n_classes + 1,))
        check_tensor(OP, "classes", classes, ("nnz",))
        check_tensor(OP, "counts", counts, (classes.shape[0],))
        for name, value in {"offsets": offsets, "classes": classes}.items():
            if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
                raise CaptError(f"{OP}: {name} must be an integer tensor, found {value.dtype}; call .long()")
        if counts.is_complex() or counts.dtype == torch.bool:
            raise CaptError(f"{OP}: counts must be an integer or floating tensor, found {counts.dtype}")
        check_index_range(OP, "offsets", offsets, 0, classes.shape[0] + 1)
        check_index_range(OP, "classes", classes, 0, n_classes)
        if readable(offsets) and bool((offsets[1:] < offsets[:-1]).any()):
            raise CaptError(f"{OP}: offsets must not decrease")
        if readable(counts):
            low, high = (float(bound) for bound in torch.aminmax(counts.detach().float()))
            if not (low >= 0 and high < float("inf")):  # NaN fails both
                raise CaptError(f"{OP}: counts must be finite and at least 0, found values from {low} to {high}")
    check_same_device(OP, logits=logits, offsets=offsets, classes=classes, counts=counts)


# ---- registration ------------------------------------------------------------------------------------------------


def _fake(
    logits: Tensor, k: int, offsets: Tensor | None, classes: Tensor | None, counts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(logits.dim() == 2, lambda: "capt::confusion_pairs: logits must be [B, C]")
    torch._check(logits.shape[1] >= 2, lambda: "capt::confusion_pairs: logits must have at least 2 classes")
    batch, kept = logits.shape[0], min(k, logits.shape[1] - 1)
    return (
        logits.new_empty((batch,), dtype=torch.int64),
        logits.new_empty((batch, kept), dtype=torch.int64),
        logits.new_empty((batch, kept), dtype=torch.float32),
    )


def _triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from capt.kernels import confusion_pairs as kernels

    found: tuple[Tensor, Tensor, Tensor] = kernels.confusion_pairs(*args)
    return found


def _define_triton() -> None:
    """capt_triton::confusion_pairs: the schema of csrc/torch/confusion_pairs.cpp, run by Triton."""
    torch.library.define(
        "capt_triton::confusion_pairs",
        "(Tensor logits, int k, Tensor? offsets, Tensor? classes, Tensor? counts) "
        "-> (Tensor pseudo, Tensor index, Tensor score)",
    )
    torch.library.impl("capt_triton::confusion_pairs", "cuda", _triton)
    torch.library.register_fake("capt_triton::confusion_pairs", _fake)


if NATIVE.loaded:
    torch.library.register_fake("capt::confusion_pairs", _fake)
if HAS_TRITON:
    _define_triton()
