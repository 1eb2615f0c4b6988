"""Seeded problems of expert_gating. Data of the router are multiples of 1/16 so small that every logit is exact in
float32 in any order of summation: the chosen experts must be those of the reference, ties included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.parity import Problem, excess
from capt import ops

NAMES = ("x", "gate", "w_in", "b_in", "w_out", "b_out")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Tokens for gathered rows and large tiles, three experts and more.
LARGE_SEEDS = range(5000, 5040)
ODD_VALUES = (float("nan"), float("inf"), -float("inf"), -0.0, 1e-40)


def problem(seed: int) -> Problem:
    """0 to 40 rows, 1 to 8 experts, top_k 1 to all; ties, odd values, strides, dropout, any set of gradients.

    ``LARGE_SEEDS``: 65 to 300 rows, 3 to 8 experts, in turn all of them and less than all.
    """
    draw = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    def grid(*shape: int) -> Tensor:
        return (normal(*shape) * 12).round().clamp(-48, 48) / 16

    dtype = DTYPES[seed % 3]
    n_tokens = 0 if pick(0, 24) == 0 else pick(1, 40 if pick(0, 3) == 0 else 9)
    dim, hidden, n_experts = pick(1, 70), pick(1, 70), pick(1, 8 if pick(0, 3) == 0 else 4)
    large = seed in LARGE_SEEDS
    if large:
        n_tokens, dim, hidden, n_experts = (65, 130, 300)[pick(0, 2)], pick(16, 96), pick(16, 150), pick(3, 8)
        if pick(0, 1):  # whole packs of 16 bytes
            dim, hidden = (value // 8 * 8 for value in (dim, hidden))
    kind = ("plain", "ties", "one expert", "odd values", "strided")[pick(0, 4)]
    x, gate = grid(n_tokens, dim), grid(n_experts, dim)
    if kind == "ties":
        gate[:] = gate[: max(1, n_experts // 2)].repeat(n_experts, 1)[:n_experts]
    if kind == "one expert":  # the others stay empty when top_k is 1
        gate[: n_experts - 1] = 0
        gate[n_experts - 1] = x[0] / 4 if n_tokens else 0
    if kind == "odd values" and n_tokens:
        x[pick(0, n_tokens - 1), pick(0, dim - 1)] = ODD_VALUES[pick(0, len(ODD_VALUES) - 1)]
    scale = dim**-0.5, hidden**-0.5
    values = [x, gate, normal(n_experts, hidden, dim) * scale[0], normal(n_experts, hidden) / 2,
              normal(n_experts, dim, hidden) * scale[1], normal(n_experts, dim) / 2]  # fmt: skip
    values = [value.to(dtype) for value in values]
    if kind == "strided":
        values = [value.mT.contiguous().mT for value in values]
        values[0] = torch.stack([values[0], values[0]], 1)[:, 1]
    wanted = pick(0, 63)
    top_k = n_experts if pick(0, 3) == 0 else pick(1, n_experts)
    if large:
        wanted, top_k = (63 if seed % 4 else wanted), (n_experts if seed % 2 else 1 + seed // 2 % (n_experts - 1))
    return Problem(
        f"{seed}: {kind} N={n_tokens} D={dim} H={hidden} E={n_experts} {dtype} gradients {wanted:06b}",
        tuple(values),
        {
            "top_k": top_k,
            "dropout": (0.0, 0.0, 0.3, 0.5)[pick(0, 3)],
            "training": pick(0, 1) == 1,
            "wanted": tuple(name for i, name in enumerate(NAMES) if wanted >> i & 1),
            "upstream": (normal(n_tokens, dim).to(dtype), normal(n_tokens, n_experts), normal(n_tokens, n_experts)),
        },
    )


def call(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    """The op on a problem, forward only."""
    given = {name: value for name, value in problem.options.items() if name not in ("wanted", "upstream")}
    torch.manual_seed(20)  # of the dropout
    return ops.expert_gating(*problem.arguments, **{**given, **options})


def run(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    """(y, weights, probs, load, gradients of the wanted inputs)."""
    own = dict(problem.options)
    wanted, upstream = own.pop("wanted"), own.pop("upstream")
    leaves = [
        value.detach().requires_grad_(name in wanted) for name, value in zip(NAMES, problem.arguments, strict=True)
    ]
    torch.manual_seed(20)  # of the dropout
    found = ops.expert_gating(*leaves, **own, **options)
    given = [(out, grad) for out, grad in zip(found, upstream, strict=False) if out.requires_grad]
    chosen = [value for value in leaves if value.requires_grad]
    if not chosen:
        return found
    outputs, grads = zip(*given, strict=True)
    gradients = torch.autograd.grad(outputs, chosen, grads, allow_unused=True)
    filled = [torch.zeros_like(v) if g is None else g for v, g in zip(chosen, gradients, strict=True)]
    return (*(out.detach() for out in found), *filled)


def complaint(problem: Problem, found: tuple[Tensor, ...]) -> str:
    """The experts chosen must be the reference's; every result as accurate as the reference in its own precision."""
    exact = Problem(problem.label, tuple(v.double() for v in problem.arguments), dict(problem.options))
    exact.options["upstream"] = tuple(grad.double() for grad in problem.options["upstream"])
    own, oracle = run(problem, backend="reference"), run(exact, backend="reference")
    if len(found) != len(oracle):
        return f"{len(found)} results instead of {len(oracle)}"
    if not torch.equal(found[1] != 0, oracle[1] != 0):
        return "other experts than in the reference"
    # Errors of long sums over tokens grow with the root of their number.
    rounding = max(4.0, len(problem.arguments[0]) ** 0.5 / 2)
    for name, mine, theirs, want in zip(_names(problem), found, own, oracle, strict=True):
        if mine.dtype != theirs.dtype:
            return f"{name}: {mine.dtype} instead of {theirs.dtype}"
        size = float(want.abs().nan_to_num(0.0, 0.0, 0.0).max()) if want.numel() else 0.0
        wrong = excess(mine, theirs, want, rounding * max(1.0, size)) if want.numel() else ""
        if wrong:
            return f"{name}: {wrong}"
    return ""


def _names(problem: Problem) -> tuple[str, ...]:
    wanted = problem.options["wanted"]
    return ("y", "weights", "probs", "load", *(f"gradient of {name}" for name in NAMES if name in wanted))
