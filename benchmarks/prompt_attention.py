"""Cases of prompt_attention and prompt_attention_shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison import Case, Comparison, without_failing
from benchmarks.rivals.prompt_attention import FORCED, GATHERED, GPU_SHARED, SHARED
from capt import ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PAIRS, K, ROWS = 200, 3, 5  # table size, pairs of an image, prompt rows of a pair
#: name: images, rows of a stream, tokens, width; heads of 64
TOKENS = {
    "32 images x 400 rows x 197 x 512": (32, 400, 197, 512),
    "4 images x 100 rows x 197 x 768": (4, 100, 197, 768),
    "4 images x 400 rows x 577 x 1024": (4, 400, 577, 1024),
}
HEAD = 64


def cases(device: str = "cpu") -> Iterator[Case]:
    """Both ops, forward and forward with backward; of the shared form with keys frozen, and with all gradients."""
    for dim in (512, 768):
        for dtype in DTYPES:
            for direction in ("forward", "both"):
                shape = f"100 images x {K} pairs x {ROWS} rows x {dim}"
                build = partial(_gathered, dim, DTYPES[dtype], direction, device)
                yield Case("prompt_attention", shape, dtype, direction, dtype == "float32", build)
    for shape, sizes in TOKENS.items():
        for dtype in DTYPES:
            for direction, frozen in (("forward", True), ("both", True), ("both", False)):
                label = shape if direction == "forward" else f"{shape}, {'frozen keys' if frozen else 'all gradients'}"
                quick = sizes[0] == 32 and frozen
                build = partial(_shared, sizes, DTYPES[dtype], direction, frozen, device)
                yield Case("prompt_attention_shared", label, dtype, direction, quick, build)


def _runs(
    forms: dict[str, Callable[..., tuple[Tensor, ...]]], leaves: list[Tensor], upstream: list[Tensor], direction: str
) -> dict[str, Callable[[], Any]]:
    """Calls without arguments: the results, or the gradients of the leaves that want one."""
    if direction == "forward":
        return {name: partial(form, *(leaf.detach() for leaf in leaves)) for name, form in forms.items()}
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def both(form: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(form(*leaves), wanted, upstream)

    return {name: partial(both, form) for name, form in forms.items()}


def _disagreement(runs: dict[str, Callable[[], Any]], dtype: torch.dtype) -> str:
    """Relative L2 error of ours against the first rival, result by result."""
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    found, expected = runs["ours"](), runs[next(name for name in runs if name != "ours")]()
    for number, (mine, want) in enumerate(zip(found, expected, strict=True)):
        error = float((mine.double() - want.double()).norm() / want.double().norm())
        if not error <= limit:
            return f"result {number}: relative error {error:.2g}"
    return ""


def _gathered(dim: int, dtype: torch.dtype, direction: str, device: str, backend: str | None) -> Comparison:
    batch = 100
    tensors = [torch.randn(*size, device=device).to(dtype) for size in ((batch, dim), *[(PAIRS, ROWS, dim)] * 2)]
    prior = torch.randn(batch, K, device=device).to(dtype)
    index = torch.randint(0, PAIRS, (2, batch, K), device=device)
    upstream = [torch.randn(batch, dim, device=device).to(dtype) for _ in range(2)]

    def ours(query: Tensor, com: Tensor, diff: Tensor, log_prior: Tensor) -> tuple[Tensor, Tensor]:
        return ops.prompt_attention(
            query, com, diff, commonality_index=index[0], difference_index=index[1], log_prior=log_prior,
            backend=backend,
        )  # fmt: skip

    def rival(form: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Tensor]:
        query, com, diff, log_prior = inputs
        return form(query, com, index[0], log_prior), form(query, diff, index[1], log_prior)

    forms: dict[str, Any] = {"ours": ours, **{name: partial(rival, form) for name, form in GATHERED.items()}}
    leaves = [value.requires_grad_(direction == "both") for value in (*tensors, prior)]
    runs = _runs(forms, leaves, upstream, direction)
    plan = ops.explain("prompt_attention", batch=batch, k=K, rows=(ROWS, ROWS), dim=dim, dtype=dtype, device=device)
    return Comparison(
        dict(runs),
        lambda: _disagreement(runs, dtype),
        plan.bytes,
        plan.flops,
        "read",
        {tuple(GATHERED): 4.0 if direction == "forward" else 2.5},
    )


def _shared(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, direction: str, frozen: bool, device: str, backend: str | None
) -> Comparison:
    batch, rows, n_keys, dim = sizes
    queries = [torch.randn(rows, dim, device=device).to(dtype) for _ in range(2)]
    tokens = [torch.randn(batch, n_keys, dim, device=device).to(dtype) for _ in range(2)]
    upstream = [torch.randn(batch, rows, dim, device=device).to(dtype) for _ in range(2)]

    def ours(com: Tensor, diff: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        return ops.prompt_attention_shared(com, diff, keys, values, n_heads=dim // HEAD, backend=backend)[:2]

    forms: dict[str, Any] = {"ours": ours}
    forms |= {name: partial(form, n_heads=dim // HEAD) for name, form in SHARED.items()}
    if device == "cuda":
        forms |= {name: partial(form, n_heads=dim // HEAD) for name, form in GPU_SHARED.items()}
    leaves = [value.requires_grad_(direction == "both") for value in queries]
    leaves += [value.requires_grad_(direction == "both" and not frozen) for value in tokens]
    runs = _runs(forms, leaves, upstream, direction)
    goals: dict[tuple[str, ...], float] = {tuple(SHARED): 1.0 if direction == "forward" else 1.3}
    if device == "cuda":
        runs = without_failing(runs)
        least = (1.4, 1.8, 2.0) if direction == "forward" else (1.6, 2.0, 2.2) if frozen else (1.3, 1.5, 1.8)
        goals = dict(zip([("packed", *FORCED), ("two_calls",), ("flex",)], least, strict=True))
    plan = ops.explain(
        "prompt_attention_shared", batch=batch, rows=(rows, rows), n_keys=n_keys, dim=dim, dtype=dtype, device=device
    )
    # Backward recomputes the scores: three products with keys frozen, five with all gradients, two forward.
    products = 1.0 if direction == "forward" else 2.5 if frozen else 3.5
    return Comparison(
        dict(runs),
        lambda: _disagreement(runs, dtype),
        plan.bytes,
        int(plan.flops * products),
        "gemm",
        goals,
    )
