"""Small finished run folders with known numbers, for the tests of everything that reads one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from capt.bank import ConfusionBank
from capt.evaluation import aggregate_seeds
from capt.files import write_json

CLASSES = ("fox", "wolf", "dog", "cat")


def record(base: float, novel: float, corrected: float = 0.0, new_errors: float = 0.0) -> dict[str, float]:
    """One seed's metrics."""
    return {
        "base": base,
        "novel": novel,
        "hm": 2 * base * novel / (base + novel),
        "sample_correction_rate": corrected,
        "pair_resolution_rate": corrected / 2,
        "net_reduction": corrected - new_errors,
        "new_error_rate": new_errors,
    }


def summary(classes: Sequence[str] = CLASSES) -> dict[str, Any]:
    """Two seeds; CAPT beats zero-shot everywhere and the linear adapter in harmonic mean."""
    return {
        "schema": 1,
        "dataset": "animals",
        "model": "embedded",
        "seeds": [1, 2],
        "methods": {
            "zero_shot": aggregate_seeds({1: record(0.5, 0.46), 2: record(0.5, 0.44)}),
            "linear_adapter": aggregate_seeds({1: record(0.84, 0.45, 0.7, 0.02), 2: record(0.86, 0.45, 0.72, 0.01)}),
            "capt": aggregate_seeds({1: record(0.88, 0.47, 0.8, 0.02), 2: record(0.9, 0.45, 0.78, 0.02)}),
        },
        "top_confusions": [
            {
                "true": classes[0],
                "predicted": classes[1],
                "counts": {"zero_shot": 9, "linear_adapter": 4, "capt": 2},
            },
            {"true": classes[2], "predicted": classes[3], "counts": {"zero_shot": 3, "linear_adapter": 3, "capt": 5}},
        ],
        "versions": {"capt": "0.1.0"},
        "hashes": {},
        "timing": {"total_s": 1.0},
    }


def write_run(folder: Path, classes: Sequence[str] = CLASSES, names: Sequence[str] | None = None) -> Path:
    """Summary, record, and a bank for both seeds: fox as wolf twice, wolf as fox once, dog as cat once."""
    write_json(folder / "summary.json", summary(classes))
    write_json(folder / "run.json", {"model": "embedded", "data": {"name": "animals", "fingerprint": "f" * 32}})
    for seed in (1, 2):
        ConfusionBank(
            torch.eye(4),
            torch.tensor([0, 0, 1, 2]),
            torch.tensor([1, 1, 0, 3]),
            torch.tensor([0.6, 0.9, 0.7, 0.8]),
            torch.tensor([10, 11, 12, 13]),
            classes,
            names=names or [f"{i}.png" for i in range(10, 14)],
            backbone="0" * 16,
        ).save(folder / f"seed-{seed}" / "bank")
    return folder
