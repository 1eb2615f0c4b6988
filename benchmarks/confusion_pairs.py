"""Cases of confusion_pairs: rows of logits against eager softmax, statistics and topk."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.comparison import Case, Comparison
from benchmarks.rivals.confusion_pairs import dense, sparse
from capt import ops

# batch, classes, k
SHAPES = {
    "B100 C1000 k5": (100, 1000, 5),
    "B1024 C1000 k5": (1024, 1000, 5),
    "B1024 C1000 k10": (1024, 1000, 10),
    "B256 C5000 k5": (256, 5000, 5),
    "B100 C20000 k10": (100, 20000, 10),
    "B1024 C20000 k10": (1024, 20000, 10),
}
QUICK = ("B100 C1000 k5", "B1024 C1000 k10", "B256 C5000 k5", "B100 C20000 k10")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ENTRIES = 8  # classes that a predicted class is confused with
DENSE_LIMIT = 5000  # classes up to which a dense C x C table is reasonable
GOAL = 3.0


def cases(device: str = "cpu") -> Iterator[Case]:
    """Every shape in both dtypes."""
    for shape in SHAPES:
        for dtype in DTYPES:
            yield Case(
                "confusion_pairs",
                shape,
                dtype,
                "forward",
                shape in QUICK,
                lambda backend, shape=shape, dtype=dtype: comparison(shape, dtype, device, backend),
            )


def comparison(shape: str, dtype: str, device: str = "cpu", backend: str | None = None) -> Comparison:
    """``ours`` and the eager forms on the same logits; one-time work on the statistics is done here."""
    batch, n_classes, k = SHAPES[shape]
    logits = (torch.randn(batch, n_classes, device=device) * 4).to(DTYPES[dtype])
    offsets = torch.arange(0, ENTRIES * n_classes + 1, ENTRIES, device=device)
    stride = max(1, n_classes // ENTRIES)
    own = torch.arange(n_classes, device=device)[:, None]
    classes = ((own + 1 + stride * torch.arange(ENTRIES, device=device)) % n_classes).sort(1).values
    counts = torch.randint(1, 9, (n_classes, ENTRIES), device=device)
    boost = 1 + counts / counts.sum(1, keepdim=True)
    flat = classes.flatten(), counts.flatten(), boost.flatten().to(logits.dtype)

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        return ops.confusion_pairs(logits, k=k, offsets=offsets, classes=flat[0], counts=flat[1], backend=backend)

    functions = {"ours": ours, "sparse": lambda: sparse(logits, k, (offsets, flat[0], flat[2]))}
    if n_classes <= DENSE_LIMIT:
        table = torch.ones(n_classes, n_classes, dtype=logits.dtype, device=device).scatter_(
            1, classes, boost.to(logits.dtype)
        )
        functions["dense"] = lambda: dense(logits, k, table)

    def verify() -> str:
        found = ours()
        tolerance = 1e-5 if logits.dtype == torch.float32 else 2e-2  # eager rounds every step to the dtype of logits
        for name, function in functions.items():
            pseudo, _, score = function()
            if not torch.equal(pseudo, found[0]) and logits.dtype == torch.float32:
                return f"{name}: other pseudo labels"
            same = pseudo == found[0]  # equal probabilities in 16 bits may pick another arg-max
            if not torch.allclose(score[same].float(), found[2][same], rtol=tolerance, atol=tolerance * 1e-2):
                return f"{name}: other scores"
        return ""

    plan = ops.explain(
        "confusion_pairs", batch=batch, n_classes=n_classes, k=k, dtype=logits.dtype, device=device, backend=backend
    )
    rivals = tuple(name for name in functions if name != "ours")
    return Comparison(functions, verify, plan.bytes, plan.flops, "read", {rivals: GOAL})
