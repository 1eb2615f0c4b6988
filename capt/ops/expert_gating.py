"""Router, expert networks and weighted sum of a small mixture of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from capt import reference
from capt.ops._checks import check, check_count, check_float, check_same_device, check_tensor
from capt.ops._plan import Plan, reference_only

OP = "expert_gating"


def plan(backend: str | None = None) -> Plan:
    """Backend of a call."""
    return reference_only(OP, backend)


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
    that use an expert), the last three float32 (float64 for float64). Differentiable, load excepted; gradient reaches
    the gate through the kept weights and through probs. Source: CAPT's expert module; dense evaluation is ours.
    Raises CaptError.
    """
    check_tensor(OP, "x", x, ("N", "D"))
    dim = x.shape[1]
    check_tensor(OP, "gate", gate, ("E", dim))
    n_experts = gate.shape[0]
    check_tensor(OP, "w_in", w_in, (n_experts, "H", dim))
    hidden = w_in.shape[1]
    check_tensor(OP, "b_in", b_in, (n_experts, hidden))
    check_tensor(OP, "w_out", w_out, (n_experts, dim, hidden))
    check_tensor(OP, "b_out", b_out, (n_experts, dim))
    check_float(OP, x=x, gate=gate, w_in=w_in, b_in=b_in, w_out=w_out, b_out=b_out)
    check_same_device(OP, x=x, gate=gate, w_in=w_in, b_in=b_in, w_out=w_out, b_out=b_out)
    check_count(OP, "top_k", top_k)
    check(top_k <= n_experts, f"{OP}: top_k={top_k} exceeds the number of experts, {n_experts}")
    check(0.0 <= dropout < 1.0, f"{OP}: dropout must lie in [0, 1), found {dropout}")
    plan(backend)
    dropout = dropout if training else 0.0
    return reference.expert_gating(x, gate, w_in, b_in, w_out, b_out, top_k, dropout, _seed() if dropout else 0)


def _seed() -> int:
    """63 random bits of torch's CPU generator, so that torch.manual_seed governs them; no GPU is waited for."""
    return int(torch.randint(torch.iinfo(torch.int64).max, ()))
