"""What evaluating many images of many classes costs: ``python -m benchmarks.multi_label_evaluation [--out FILE]``.

Average precision of every class by the batched sort, against scikit-learn class by class and torch's stable sort of the
same chunks, on normal scores with three labels an image; each result is checked against the others.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from benchmarks.machine import machine_card
from capt.evaluation import average_precision, multi_label
from capt.files import write_json

SECONDS = 10.0  # of a CPU, for one evaluation


def torch_sort(scores: Any, targets: Any) -> Any:
    """The same numbers by torch.sort and a cumulative sum."""
    found = []
    step = max(1, multi_label.CHUNK_ENTRIES // len(scores))
    rank = torch.arange(1, len(scores) + 1)
    for start in range(0, scores.shape[1], step):
        order = torch.from_numpy(scores[:, start : start + step]).t().sort(dim=1, descending=True, stable=True).indices
        labels = torch.from_numpy(targets[:, start : start + step]).t().gather(1, order)
        found.append((labels.cumsum(1) / rank * labels).double().sum(1) / labels.sum(1))
    return torch.cat(found).numpy()


def class_by_class(scores: Any, targets: Any) -> Any:
    """scikit-learn's function for each class."""
    return np.array([average_precision_score(targets[:, c], scores[:, c]) for c in range(scores.shape[1])])


def measure(n_images: int, n_classes: int, rounds: int) -> dict[str, Any]:
    """CPU seconds of each way on one thread, the least of the rounds, and the memory ours needs beside the scores."""
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    scores = random.standard_normal((n_images, n_classes), np.float32)
    targets = np.zeros(scores.shape, bool)
    targets[np.arange(n_images).repeat(3), random.integers(0, n_classes, 3 * n_images)] = True
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    own = average_precision(scores, targets)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident
    seconds: dict[str, float] = {}
    for name, way in {"ours": average_precision, "torch_sort": torch_sort, "scikit_learn": class_by_class}.items():
        for _ in range(rounds):
            began = time.process_time()
            found = way(scores, targets)
            seconds[name] = min(seconds.get(name, np.inf), time.process_time() - began)
        np.testing.assert_allclose(found, own, rtol=0, atol=1e-6, err_msg=name)
    return {
        "images": n_images, "classes": n_classes, "cpu_seconds": seconds, "peak_bytes": peak,
        "ratios": {name: value / seconds["ours"] for name, value in seconds.items()},
        "goals": {"cpu_seconds": seconds["ours"] < SECONDS},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--classes", type=int, default=1200)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    found = measure(arguments.images, arguments.classes, arguments.rounds)
    ways = (f"{name} {value:.2f} s ({found['ratios'][name]:.1f}x)" for name, value in found["cpu_seconds"].items())
    print(
        f"{found['images']:,} images x {found['classes']:,} classes, one thread: {', '.join(ways)}; "
        f"goal of ours {SECONDS:.0f} s; {found['peak_bytes'] / 1e6:,.0f} MB beside the scores"
    )
    if arguments.out:
        write_json(arguments.out, {"schema": 1, "machine": machine_card(), **found})


if __name__ == "__main__":
    main()
