"""Measure, explain and mitigate the center bias of both shipped models and write everything to a JSON file.

python scripts/center_bias_results.py --out docs/results/center_bias.json
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import capt
from capt.files import read_json, write_json


def timed(run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """A result, and what it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    return found, {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["embedded", "embedded-vit"])
    parser.add_argument("--objects", default="emoji")
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--cells", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    results = read_json(chosen.out) if chosen.out.is_file() else {"schema": 1, "models": {}}
    results["machine"] = {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for name in chosen.models:
        bias = capt.CenterBias(capt.load(name), chosen.objects, n=chosen.n, cells=chosen.cells)
        steps: dict[str, Callable[[], Any]] = {
            "measure": bias.measure, "preprocessing": bias.check_preprocessing, "explain": bias.explain,
            "mitigate": bias.mitigate,
        }  # fmt: skip
        results["models"][name] = {}
        for step, run in steps.items():
            found, took = timed(run)
            results["models"][name][step] = {**found.record(), "took": took}
            write_json(chosen.out, results)
            words = found.words() if hasattr(found, "words") else found.verdict
            print(name, step, took, words, sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
