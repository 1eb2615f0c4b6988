"""Asymmetric multi-label loss."""

from __future__ import annotations

from torch import Tensor

from capt import reference
from capt.errors import CaptError
from capt.ops._checks import check_float, check_number, check_same_device, check_tensor
from capt.ops._plan import Plan, reference_only

OP = "asymmetric_loss"


def plan(backend: str | None = None) -> Plan:
    """Backend of a call."""
    return reference_only(OP, backend)


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
    ``p_m**gamma_neg * -log(1 - p + margin)``, logarithms clamped at eps; the focal factors are constants for the
    gradient. reduction: "mean" over all entries, "sum" or "none" ([B, C]); the result is float32 (float64 for
    float64 logits). Source: the loss CPRFL trains with. Raises CaptError.
    """
    check_tensor(OP, "logits", logits, ("B", "C"))
    check_tensor(OP, "targets", targets, tuple(logits.shape))
    check_float(OP, logits=logits)
    check_same_device(OP, logits=logits, targets=targets)
    gamma_pos, gamma_neg = check_number(OP, "gamma_pos", gamma_pos), check_number(OP, "gamma_neg", gamma_neg)
    margin, eps = check_number(OP, "margin", margin), check_number(OP, "eps", eps)
    if not (gamma_pos >= 0 and gamma_neg >= 0):
        raise CaptError(f"{OP}: gammas must be >= 0, found {gamma_pos} and {gamma_neg}")
    if not 0.0 <= margin < 1.0:
        raise CaptError(f"{OP}: margin must lie in [0, 1), found {margin}")
    if not 0.0 < eps < 1.0:
        raise CaptError(f"{OP}: eps must lie in (0, 1), found {eps}")
    if reduction not in ("mean", "sum", "none"):
        raise CaptError(f"{OP}: reduction must be mean, sum or none, found '{reduction}'")
    plan(backend)
    return reference.asymmetric_loss(logits, targets, gamma_pos, gamma_neg, margin, eps, reduction)
