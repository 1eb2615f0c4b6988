"""Fifty re-weightings of the last aggregation from kept inputs, against fifty full passes.

    python -m benchmarks.pooling_sweep --out benchmarks/results/pooling_sweep.json

Both shipped models, random images: what is timed does not depend on what they show.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import capt
from benchmarks.machine import machine_card
from benchmarks.timer import interleaved
from capt.backbones import Backbone
from capt.files import write_json
from capt.modules import (
    MassTransfer,
    PoolingSweep,
    PriorCancellation,
    RadialBias,
    Redistribution,
    Temperature,
    UniformMixture,
    attention_prior,
    redistributed,
)

#: The goal: cost of the settings as a part of as many full passes.
GOAL = 0.05


def settings(prior: Tensor) -> list[Redistribution]:
    """Fifty of all rules, with and without head filters."""
    return [
        *(RadialBias(x / 4, shape) for x in (-4, -2, 1, 2, 4, 8, 16) for shape in ("r", "square")),
        *(MassTransfer(x / 10) for x in range(1, 11)),
        *(MassTransfer(x / 5, heads="biased") for x in range(1, 6)),
        *(PriorCancellation(prior, x / 10) for x in range(1, 11)),
        *(Temperature(x) for x in (0.5, 0.8, 1.2, 1.5, 2.0)),
        *(UniformMixture(x / 6) for x in range(1, 7)),
    ]


def agreement(backbone: Backbone, images: Tensor, rules: Sequence[Redistribution], found: Tensor) -> float:
    """Largest relative difference to full passes of re-weighted backbones."""
    differences = []
    for rule, features in zip(rules, found, strict=True):
        expected = redistributed(backbone, rule).image_features(images)
        differences.append(float((features - expected).abs().max() / expected.abs().max()))
    return max(differences)


@torch.no_grad()
def measure(name: str, n_images: int, rounds: int) -> dict[str, Any]:
    """Times of one shipped model."""
    backbone = capt.load(name)
    images = torch.randn(n_images, 3, *backbone.image_hw, generator=torch.Generator().manual_seed(0))
    sweep = PoolingSweep(backbone, images)
    rules = settings(attention_prior(sweep.pooling, sweep.inputs))
    timings = interleaved(
        {
            "full pass": lambda: backbone.image_features(images),
            "keeping inputs": lambda: PoolingSweep(backbone, images),
            "sweep": lambda: sweep.features(rules),
        },
        rounds=rounds,
        warmup=1,
    )
    full, keeping, swept = (timings[key].median for key in ("full pass", "keeping inputs", "sweep"))
    part = swept / (len(rules) * full)
    chosen = slice(None, None, 7)
    few = images[:8]
    found = PoolingSweep(backbone, few).features(rules[chosen])
    return {
        "pooling": sweep.pooling.kind, "images": n_images, "settings": len(rules),
        "milliseconds": {key: asdict(timing) for key, timing in timings.items()},
        "part": round(part, 5), "part_with_inputs": round((swept + keeping) / (len(rules) * full), 5),
        "largest_relative_difference": agreement(backbone, few, rules[chosen], found), "goal_met": part <= GOAL,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    models = {name: measure(name, arguments.images, arguments.rounds) for name in ("embedded-vit", "embedded")}
    for name, found in models.items():
        print(
            f"{name} ({found['pooling']}): {found['settings']} settings of {found['images']} images cost "
            f"{100 * found['part']:.2f} % of as many full passes, {100 * found['part_with_inputs']:.2f} % with the one "
            f"pass that keeps the inputs (goal {100 * GOAL:.0f} %); features differ by "
            f"{found['largest_relative_difference']:.1e}"
        )
    if arguments.out:
        write_json(arguments.out, {"schema": 1, "machine": machine_card(), "models": models})


if __name__ == "__main__":
    main()
