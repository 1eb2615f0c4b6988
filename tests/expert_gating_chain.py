"""expert_gating out of the four ops of one backend, for backends that this machine runs only in a test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.parity import Problem


def run(ops: Any, problem: Problem) -> tuple[Tensor, ...]:
    """What ``benchmarks.parity.expert_gating.run`` returns. ops: expert_router and so on, as in the schemas."""
    options = problem.options
    x, gate, *experts = problem.arguments
    torch.manual_seed(20)
    dropout = options["dropout"] if options["training"] else 0.0
    seed = int(torch.randint(torch.iinfo(torch.int64).max, ())) if dropout else 0
    weights, probs, load = ops.expert_router(x, gate, options["top_k"])
    y = ops.expert_mix(x, weights, *experts, dropout, seed)
    wanted, (grad_y, grad_weights, grad_probs) = options["wanted"], options["upstream"]
    found = (y, weights, probs, load)
    if not wanted:
        return found
    routed = "x" in wanted or "gate" in wanted
    need = ["x" in wanted, routed, *(name in wanted for name in ("w_in", "b_in", "w_out", "b_out"))]
    mixed = ops.expert_mix_backward(x, weights, *experts, dropout, seed, grad_y, *need)
    assert all((grad.numel() > 0) <= needed for grad, needed in zip(mixed, need, strict=True))
    gradients = dict(zip(("x", "weights", "w_in", "b_in", "w_out", "b_out"), mixed, strict=True))
    if routed:
        to_x, gradients["gate"] = ops.expert_router_backward(
            gradients["weights"] + grad_weights, grad_probs, weights, probs, x, gate, "x" in wanted, "gate" in wanted
        )
        if "x" in wanted:
            gradients["x"] = gradients["x"] + to_x
    return (*found, *(gradients[name] for name in ("x", "gate", "w_in", "b_in", "w_out", "b_out") if name in wanted))
