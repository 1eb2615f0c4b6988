"""Pseudo label and most confusable classes of each image."""

from __future__ import annotations

from torch import Tensor

from capt import reference
from capt.ops._checks import check, check_count, check_float, check_index_range, check_same_device, check_tensor
from capt.ops._plan import Plan, reference_only

OP = "confusion_pairs"


def plan(backend: str | None = None) -> Plan:
    """Backend of a call."""
    return reference_only(OP, backend)


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

    logits [B, C]. Statistics in compressed rows keyed by the predicted class p: offsets int64 [C+1], classes int64
    [nnz] (no repeats in a row), counts [nnz] >= 0. With p the arg-max of a row and n its statistics,
    ``S_i = (1 + n_i / sum n) * softmax(logits)_i`` for i != p. Without statistics, or with an empty row, S is the
    softmax.

    Returns (pseudo int64 [B], index int64 [B, k'], score float32 [B, k']), k' = min(k, C - 1), descending, ties and
    arg-max to the lower class. No gradient. Source: CAPT paper, Eq. 7. Raises CaptError.
    """
    check_tensor(OP, "logits", logits, ("B", "C"))
    check_float(OP, logits=logits)
    n_classes = logits.shape[1]
    check(n_classes >= 2, f"{OP}: logits must have at least 2 classes, found {n_classes}")
    check_count(OP, "k", k)
    given = [value is not None for value in (offsets, classes, counts)]
    check(all(given) or not any(given), f"{OP}: offsets, classes and counts belong together; give all three or none")
    if offsets is not None and classes is not None and counts is not None:
        check_tensor(OP, "offsets", offsets, (n_classes + 1,))
        check_tensor(OP, "classes", classes, ("nnz",))
        check_tensor(OP, "counts", counts, (classes.shape[0],))
        check_index_range(OP, "offsets", offsets, 0, classes.shape[0] + 1)
        check_index_range(OP, "classes", classes, 0, n_classes)
        offsets, classes = offsets.long(), classes.long()
    check_same_device(OP, logits=logits, offsets=offsets, classes=classes, counts=counts)
    plan(backend)
    return reference.confusion_pairs(logits, k, offsets, classes, counts)
