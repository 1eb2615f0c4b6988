"""Measure, explain and mitigate the center bias of both shipped models and write everything to a JSON file.

A run is a model, cells, objects and passes; runs that are in the output are not repeated.

    python scripts/center_bias_results.py --out results.json
    python scripts/center_bias_results.py --out results.json --models embedded --cells 3 --n 40 --passes 6
    python scripts/center_bias_results.py --out results.json --models embedded --objects cutouts
    python scripts/center_bias_results.py --out results.json --models ViT-B-32 --cells 5 --steps measure preprocessing

The last has random weights and is there for the time it takes.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "0")

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
    parser.add_argument("--cells", type=int, nargs="+", default=[5, 3])
    parser.add_argument("--steps", nargs="+", default=["measure", "preprocessing", "explain", "mitigate"])
    parser.add_argument("--passes", type=int, default=1, help="of the mitigation")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    results = read_json(chosen.out) if chosen.out.is_file() else {"schema": 1, "runs": {}}
    results["machine"] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    for name in chosen.models:
        for cells in chosen.cells:
            key = f"{name}, {cells} x {cells}, {chosen.n} objects, {chosen.passes} passes".replace("1 passes", "1 pass")
            key += "" if chosen.objects == "emoji" else f", {Path(chosen.objects).name}"
            if key in results["runs"]:
                continue
            bias = capt.CenterBias(capt.load(name), chosen.objects, n=chosen.n, cells=cells)
            # The choice of objects is part of what the first step takes.
            steps: dict[str, Callable[[], Any]] = {
                "measure": bias.measure, "preprocessing": bias.check_preprocessing, "explain": bias.explain,
                "mitigate": partial(bias.mitigate, passes=chosen.passes),
            }  # fmt: skip
            found = {}
            for step in chosen.steps:
                result, took = timed(steps[step])
                found[step] = {**result.record(), "took": took}
                words = result.words() if hasattr(result, "words") else result.verdict
                words = [words] if isinstance(words, str) else words
                print(key, step, took, *words, sep="\n  ", flush=True)
            results["runs"][key] = found
            write_json(chosen.out, results)


if __name__ == "__main__":
    main()
