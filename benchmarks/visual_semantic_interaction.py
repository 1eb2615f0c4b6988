"""The interaction of patches and category prompts against the full encoder: time, and memory over the classes.

    python -m benchmarks.visual_semantic_interaction --out benchmarks/results/visual_semantic_interaction.json

Forward and backward with gradients to patches, prompts and weights, 16 images of 196 patches, width 512 with the
published ratios (8 heads twice as wide in all, feed-forward as wide as the model), float32, dropout 0. Two results:
the features p' [B, C, d], and the scores <p', p> [B, C], which are what the method trains. Rivals: the layer by its
definition with torch's own attention, its projections apart or in one product, prompts' rows read out at the end.
Time: of the processor, on one thread, which other work on the machine disturbs least. Memory: of a process a point,
the peak during its first step of that size over what it held before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import machine_card
from benchmarks.timer import interleaved
from capt.files import write_json
from capt.modules.visual_semantic_interaction import InteractionLayer, VisualSemanticInteraction

IMAGES, PATCHES, DIM = 16, 196, 512
GOALS = {80: 2.0, 1000: 4.0}
MEMORY_CLASSES = (625, 1250, 2500, 5000)
MEMORY_GOAL = 8 << 30
FORMS = ("ours", "full", "full, one projection")


def flops(n_classes: int, form: str, result: str) -> int:
    """Of a forward and backward pass an image; attention counts five products backward, all others two."""
    inner, tokens = 2 * DIM, PATCHES + n_classes
    if form == "ours":
        linear = (2 * PATCHES + 3 * n_classes / IMAGES) * DIM * inner + n_classes * DIM * (inner + DIM)
        linear += n_classes * DIM * DIM * (1 if result == "features" else 1 / IMAGES)
        attention = 2 * inner * (n_classes * PATCHES + n_classes**2 / IMAGES)
    else:
        linear, attention = tokens * DIM * (4 * inner + 2 * DIM), 2 * inner * tokens**2
    return round(2 * (3 * linear + 3.5 * attention))


def one_projection(layer: InteractionLayer, patches: Tensor, prompts: Tensor) -> Tensor:
    """``VisualSemanticInteraction.full`` of one layer, queries, keys and values out of one product."""
    tokens = torch.cat([patches, prompts.expand(len(patches), -1, -1)], dim=1)
    weight = torch.cat([layer.query.weight, layer.key.weight, layer.value.weight])
    projected = F.linear(layer.norm_in(tokens), weight).unflatten(-1, (3, layer.n_heads, -1))
    attended = F.scaled_dot_product_attention(*projected.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
    return layer.feed_forward(layer.mixed(tokens, attended))[:, patches.shape[1] :]


def step(n_classes: int, form: str, result: str) -> Callable[[], tuple[Tensor, ...]]:
    """One forward and backward pass, the backward pass that of random gradients: result and gradients."""
    torch.manual_seed(0)
    model = VisualSemanticInteraction(DIM, dropout=0.0)
    patches, prompts = (torch.randn(*shape, requires_grad=True) for shape in ((IMAGES, PATCHES, DIM), (n_classes, DIM)))
    weights = torch.randn(IMAGES, n_classes, *([DIM] if result == "features" else []))
    layer = model.layers[0]
    assert isinstance(layer, InteractionLayer)

    def forward() -> Tensor:
        if form == "ours":
            return model(patches, prompts) if result == "features" else model.scores(patches, prompts)
        features = model.full(patches, prompts) if form == "full" else one_projection(layer, patches, prompts)
        return features if result == "features" else torch.einsum("bcd,cd->bc", features, prompts)

    def run() -> tuple[Tensor, ...]:
        out = forward()
        return out.detach(), *torch.autograd.grad(out, (patches, prompts, *model.parameters()), weights)

    return run


def difference(n_classes: int, result: str) -> float:
    """Largest relative difference of results and gradients from those of the definition."""
    wanted, *others = (step(n_classes, form, result)() for form in ("full", "ours", "full, one projection"))
    return max(
        float((a - b).abs().max() / b.abs().max())
        for found in others
        for a, b in zip(found, wanted, strict=True)
    )  # fmt: skip


def times(n_classes: int, result: str) -> dict[str, Any]:
    """Milliseconds of processor time, and the ratio to the better rival."""
    wrong = difference(n_classes, result)
    if not wrong < 1e-4:
        raise SystemExit(f"{result} of {n_classes} classes differ from the definition by {wrong:.2g}")
    functions = {form: step(n_classes, form, result) for form in FORMS}
    timing = interleaved(functions, rounds=7 if n_classes < 500 else 3, warmup=1, clock=time.process_time)
    spent = {form: round(timing[form].median, 1) for form in FORMS}
    best = min(spent[form] for form in FORMS[1:])
    return {
        "classes": n_classes, "result": result, "ms": spent, "ratio": round(best / spent["ours"], 2),
        "flops_ratio": round(flops(n_classes, "full", result) / flops(n_classes, "ours", result), 2),
        "goal": GOALS[n_classes], "difference": wrong,
    }  # fmt: skip


def status(field: str) -> int:
    """Bytes of a field of the process's memory status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def added(n_classes: int) -> int:
    """Bytes that the first step of its size holds at its peak, over what the process held before it."""
    step(8, "ours", "scores")()  # loads what is loaded once
    run = step(n_classes, "ours", "scores")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def peak(n_classes: int) -> int:
    """``added`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.visual_semantic_interaction", "--peak", str(n_classes)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Entry point: every result is printed as it is found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--classes", type=int, nargs="*", default=list(GOALS), choices=GOALS, help="of the times")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(added(arguments.peak))
        return
    found: dict[str, Any] = {"machine": machine_card(), "times": [], "timed_threads": 1, "peak_bytes": {}}
    for n_classes in MEMORY_CLASSES:
        found["peak_bytes"][str(n_classes)] = peak(n_classes)
        print(f"{n_classes} classes: {found['peak_bytes'][str(n_classes)]} bytes", flush=True)
    torch.set_num_threads(1)
    for n_classes in arguments.classes:
        for result in ("features", "scores"):
            found["times"].append(times(n_classes, result))
            print(json.dumps(found["times"][-1]), flush=True)
    if arguments.out:
        write_json(arguments.out, {**found, "peak_goal": MEMORY_GOAL})


if __name__ == "__main__":
    main()
