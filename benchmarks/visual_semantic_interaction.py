"""The interaction of patches and category prompts against the full encoder: time, and memory over the classes.

    python -m benchmarks.visual_semantic_interaction --out benchmarks/results/visual_semantic_interaction.json

Forward and backward with gradients to patches, prompts and weights, 16 images of 196 patches, width 512 with the
published ratios (8 heads twice as wide in all, feed-forward as wide as the model), float32. The rival is the layer by
its definition, with torch's own attention, and the prompts' rows read out at the end. Memory: peak of a process of its
own, less that of the same process after a tiny step.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine_card
from benchmarks.timer import interleaved
from capt.files import write_json
from capt.modules.visual_semantic_interaction import VisualSemanticInteraction

IMAGES, PATCHES, DIM = 16, 196, 512
GOALS = {80: 2.0, 1000: 4.0}
MEMORY_CLASSES = (625, 1250, 2500, 5000)
MEMORY_GOAL = 8 << 30


def step(n_classes: int, full: bool) -> Callable[[], None]:
    """One forward and backward pass; the backward pass is that of random gradients."""
    torch.manual_seed(0)
    model = VisualSemanticInteraction(DIM, dropout=0.0).train()
    patches, prompts = (torch.randn(*shape, requires_grad=True) for shape in ((IMAGES, PATCHES, DIM), (n_classes, DIM)))
    weights = torch.randn(IMAGES, n_classes, DIM)
    path = model.full if full else model.forward

    def run() -> None:
        model.zero_grad(set_to_none=True)
        patches.grad = prompts.grad = None
        path(patches, prompts).backward(weights)

    return run


def peak(n_classes: int) -> int:
    """Bytes that a step with ``n_classes`` adds to a process."""
    command = [sys.executable, "-m", "benchmarks.visual_semantic_interaction", "--peak", str(n_classes)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure() -> dict[str, Any]:
    """Times in turn, memory one process after the other."""
    rows = []
    for n_classes, goal in GOALS.items():
        timing = interleaved({"ours": step(n_classes, False), "full": step(n_classes, True)}, rounds=7)
        ours, theirs = (timing[name].median for name in ("ours", "full"))
        rows.append(
            {"classes": n_classes, "ours_ms": round(ours, 1), "full_ms": round(theirs, 1),
             "ratio": round(theirs / ours, 2), "goal": goal}
        )  # fmt: skip
    memory = {str(n): peak(n) for n in MEMORY_CLASSES}
    return {"times": rows, "peak_bytes": memory, "peak_goal": MEMORY_GOAL}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        step(8, False)()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step(arguments.peak, False)()
        print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
        return
    found = {"machine": machine_card(), **measure()}
    print(json.dumps(found, indent=2))
    if arguments.out:
        write_json(arguments.out, found)


if __name__ == "__main__":
    main()
