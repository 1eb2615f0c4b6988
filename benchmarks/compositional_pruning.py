"""What dropping infeasible pairs before encoding and scoring saves, on an open world of 50,000 pairs.

    python -m benchmarks.compositional_pruning --out benchmarks/results/compositional_pruning.json

The vocabulary is that of the shipped pairs, widened by shades of colours and by the names of the shipped emoji; images
are test images of the shipped pairs. Both ways end with the same threshold: without pruning every pair is encoded and
scored, and infeasible ones are masked then; with it they are never encoded. MSCI with the feed-forward width of the
shipped results, untrained.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine_card
from capt.backbones import load as load_backbone
from capt.data import load as load_data
from capt.data import load_compositional
from capt.evaluation import BestPairs, PairSpace, feasibility
from capt.files import write_json
from capt.methods.compositional.model import CompositionalModel
from capt.methods.compositional.scoring import encode_pairs, score
from capt.methods.msci import MSCI
from capt.methods.msci_config import MSCIConfig

N_STATES, N_OBJECTS, N_IMAGES = 250, 200, 32
KEPT = 0.15  # of the unseen pairs
SHADES = (
    "dark",
    "pale",
    "bright",
    "dull",
    "deep",
    "light",
    "vivid",
    "soft",
    "warm",
    "cool",
    "striped",
    "spotted",
    "shiny",
)
COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "grey", "pink", "golden", "silver",
    "turquoise", "beige", "violet", "olive",
)  # fmt: skip


class Scene:
    """Vocabulary, feasibility, images and an untrained model."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        data, self.backbone = load_compositional("emoji-pairs"), load_backbone("embedded")
        more = [name for name in load_data("emoji").classes if name not in data.objects]
        states = [*data.states, *(f"{shade} {colour}" for shade in SHADES for colour in COLOURS)][:N_STATES]
        objects = [*data.objects, *more][:N_OBJECTS]
        # Every new state and object is seen in a few pairs, as in published data sets.
        seen = torch.zeros(N_STATES, N_OBJECTS, dtype=torch.bool)
        seen[tuple(torch.from_numpy(data.pairs[data.split_pairs["train"]]).T)] = True
        seen |= torch.rand(N_STATES, N_OBJECTS) < 0.02
        vectors = [self.backbone.class_text_features(names) for names in (states, objects)]
        plausible = feasibility(vectors[0], vectors[1], seen.nonzero())
        self.world = PairSpace.open_world(N_STATES, N_OBJECTS, seen.nonzero(), plausible)
        unseen = plausible[~seen].double()
        self.threshold = float(unseen.quantile(1 - KEPT))
        self.model: CompositionalModel = MSCI(
            self.backbone, states, objects, seen.nonzero(), replace(MSCIConfig(), stage_mlp=1.0)
        ).eval()
        test = data.test.subset(torch.randperm(len(data.test))[:N_IMAGES].numpy())
        self.labels = torch.from_numpy(data.pairs[test.labels])
        pixels = torch.stack([self.backbone.preprocess(test.image(i)) for i in range(len(test))])
        self.inputs = self.model.inputs(pixels)

    def run(self, space: PairSpace, thresholds: Tensor | None) -> tuple[BestPairs, float]:
        """Best pairs of the images, and seconds for encoding and scoring all pairs of a space."""
        start = time.perf_counter()
        texts = encode_pairs(self.model, space)
        meter = score(self.model, texts, space, lambda rows: self.inputs[rows], self.labels, thresholds=thresholds)
        return meter.best_pairs(), time.perf_counter() - start


def measure() -> dict[str, Any]:
    """Both ways once, after a warm-up on the seen pairs; they must agree in every metric."""
    scene = Scene()
    pruned = scene.world.pruned(scene.threshold)
    scene.run(pruned.pruned(float("inf")), None)
    with_pruning, quick = scene.run(pruned, None)
    masked, slow = scene.run(scene.world, torch.tensor([scene.threshold], dtype=torch.float64))
    first, second = with_pruning.record(), masked.record()
    if first != second:
        raise SystemExit(f"the two ways disagree:\n{first}\n{second}")
    return {
        "pairs": len(scene.world), "pairs_kept": len(pruned), "images": N_IMAGES,
        "seconds_without_pruning": round(slow, 2), "seconds_with_pruning": round(quick, 2),
        "ratio": round(slow / quick, 2), "goal": 3.0, "metrics_of_both": first,
    }  # fmt: skip


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = {"machine": machine_card(), **measure()}
    print(json.dumps(found, indent=2))
    if arguments.out:
        write_json(arguments.out, found)


if __name__ == "__main__":
    main()
