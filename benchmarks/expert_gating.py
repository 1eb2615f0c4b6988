"""Cases of expert_gating: the router alone, and router, experts and weighted sum, against what torch offers.

All functions run under torch.inference_mode on contiguous tensors of one dtype. ``compiled`` is the dense formulation
through torch.compile, compiled before the clock starts; the long list has it, the quick one the same code eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.comparison import Case, Comparison, without_failing
from benchmarks.rivals import expert_gating as rivals
from capt import ops, reference

DIM, TOP_K = 768, 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUTER_SHAPES = [(4, 3), (32, 8), (256, 3), (1024, 16), (4096, 3), (4096, 16)]  # tokens, experts
TOKENS = (4, 8, 16, 32, 256, 1024)


def cases(device: str = "cpu") -> Iterator[Case]:
    """The router, then the whole op, then the whole op with gradients."""
    for dtype in DTYPES:
        for tokens, experts in ROUTER_SHAPES:
            yield Case("expert_gating", f"router T {tokens}, E {experts}", dtype, "forward", True,
                       lambda backend, t=tokens, e=experts, d=dtype: _router(t, e, d, device, backend))  # fmt: skip
        for tokens in TOKENS:
            for compiled in (False, True):
                on_gpu = torch.device(device).type == "cuda"  # there a graph of eager launches is no rival
                quick = compiled == on_gpu and tokens in ((4, 32, 256, 1024) if on_gpu else (4, 32, 256))
                name = f"T {tokens}" + (", compiled rival" if compiled else "")
                yield Case("expert_gating", name, dtype, "forward", quick,
                           lambda backend, t=tokens, d=dtype, c=compiled: _whole(t, d, c, device, backend))  # fmt: skip
        for tokens in (32, 256):
            yield Case("expert_gating", f"T {tokens}", dtype, "both", False,
                       lambda backend, t=tokens, d=dtype: _both(t, d, device, backend))  # fmt: skip


def parameters(tokens: int, experts: int, dtype: str, device: str) -> list[Tensor]:
    """x, gate, w_in, b_in, w_out, b_out with H = 4 D."""
    hidden = 4 * DIM
    shapes = [(tokens, DIM), (experts, DIM), (experts, hidden, DIM), (experts, hidden), (experts, DIM, hidden),
              (experts, DIM)]  # fmt: skip
    scales = [1.0, DIM**-0.5, DIM**-0.5, 0.5, hidden**-0.5, 0.5]
    return [
        (torch.randn(shape, device=device) * scale).to(DTYPES[dtype])
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def _inference(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return call()

    return run


def _router(tokens: int, experts: int, dtype: str, device: str, backend: str | None) -> Comparison:
    x = torch.randn(tokens, DIM, device=device).to(DTYPES[dtype])
    gate = (torch.randn(experts, DIM, device=device) * DIM**-0.5).to(DTYPES[dtype])
    namespace = torch.ops.capt_triton if backend == "triton" else torch.ops.capt
    op = namespace.expert_router.default
    functions = {
        "ours": lambda: op(x, gate, TOP_K),
        "eager": lambda: rivals.router(x, gate, TOP_K),
        "eager without load": lambda: rivals.router_without_load(x, gate, TOP_K),
    }

    def verify() -> str:
        found, want = op(x, gate, TOP_K), reference.expert_router(x, gate, TOP_K)
        names = ("weights", "probs", "load")
        wrong = [n for n, a, b in zip(names, found, want, strict=True) if not torch.allclose(a, b, atol=1e-4)]
        return ", ".join(wrong)

    traffic = (x.numel() + gate.numel()) * x.itemsize + (2 * tokens + 1) * experts * 4
    return Comparison({name: _inference(call) for name, call in functions.items()}, verify, traffic,
                      2 * tokens * experts * DIM, "read", {("eager",): 8.0 if device == "cuda" else 4.0})  # fmt: skip


def _whole(tokens: int, dtype: str, compiled: bool, device: str, backend: str | None) -> Comparison:
    values = parameters(tokens, 3, dtype, device)
    dense = torch.compile(rivals.dense) if compiled else rivals.dense
    name = "compiled dense" if compiled else "dense"
    functions: dict[str, Callable[[], object]] = {
        "ours": _inference(lambda: ops.expert_gating(*values, top_k=TOP_K, backend=backend)),
        "loop": _inference(lambda: rivals.loop(*values, TOP_K)),
        name: _inference(lambda: dense(*values, TOP_K)),
    }

    if device == "cuda":
        functions["grouped"] = _inference(lambda: rivals.grouped(*values, TOP_K))
        functions = without_failing(functions)

    def verify() -> str:
        own = ops.expert_gating(*values, top_k=TOP_K, backend=backend)[0]
        return _differences(own, [call() for rival, call in functions.items() if rival != "ours"])

    plan = ops.explain("expert_gating", tokens=tokens, dim=DIM, dtype=DTYPES[dtype], device=device, backend=backend)
    goal: dict[tuple[str, ...], float]
    goal = {("loop", name): 1.5 if tokens <= 32 else 1.05} if tokens <= 256 else {}
    if device == "cuda":
        least = (15.0, 1.3, 2.0) if tokens <= 256 else (3.0, 1.4, 1.5)
        goal = dict(zip([("loop",), ("compiled dense",), ("grouped",)], least, strict=True))
    return Comparison(functions, verify, plan.bytes, plan.flops, "read" if tokens <= 32 else "gemm", goal)


def _differences(own: Tensor, others: list[object]) -> str:
    for other in others:
        assert isinstance(other, Tensor)
        # A rival in 16 bits rounds the probabilities before it chooses: a few rows may go to other experts.
        row = (own - other).float().norm(dim=1) / own.float().norm(dim=1)
        if float(row.median()) > (1e-4 if own.dtype == torch.float32 else 2e-2):
            return f"a rival is {float(row.median()):.2g} away in the median row"
    return ""


def _both(tokens: int, dtype: str, device: str, backend: str | None) -> Comparison:
    leaves = [value.requires_grad_() for value in parameters(tokens, 3, dtype, device)]
    upstream = torch.randn_like(leaves[0])

    def gradients(form: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(form(), leaves, upstream)

    functions = {
        "ours": gradients(lambda: ops.expert_gating(*leaves, top_k=TOP_K, backend=backend)[0]),
        "loop": gradients(lambda: rivals.loop(*leaves, TOP_K)),
        "dense": gradients(lambda: rivals.dense(*leaves, TOP_K)),
    }

    def verify() -> str:
        own = ops.expert_gating(*leaves, top_k=TOP_K, backend=backend)[0].detach()
        return _differences(own, [rivals.loop(*leaves, TOP_K).detach()])

    plan = ops.explain("expert_gating", tokens=tokens, dim=DIM, dtype=DTYPES[dtype], device=device, backend=backend)
    return Comparison(functions, verify, 3 * plan.bytes, 4 * plan.flops, "gemm")
