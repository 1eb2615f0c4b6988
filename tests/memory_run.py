"""Trains CAPT on many synthetic classes and prints announced and measured memory (run by tests/test_memory.py).

python -m tests.memory_run CLASSES BASE FOLDER
"""

from __future__ import annotations

import resource
import sys

import numpy as np
import torch
from PIL import Image

from capt.data import DataSet, ImageSet
from capt.files import read_json
from capt.methods.base.registry import base_type
from capt.methods.capt_config import CAPTConfig
from capt.methods.runs import Run, RunOptions, few_shot_all
from capt.training import TrainingOptions
from tests.tiny import backbone


def many_classes(n_classes: int) -> DataSet:
    """One training and one test image of ``n_classes`` classes."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(2 * n_classes)]
    names = tuple(f"thing {number}" for number in range(n_classes))
    both = ImageSet.from_images(images, list(range(n_classes)) * 2, names)
    halves = both.subset(np.arange(n_classes)), both.subset(np.arange(n_classes, 2 * n_classes))
    return DataSet("many", halves[0], None, halves[1], names)


def peak() -> int:
    """Largest resident size of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    n_classes, base, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    quick = TrainingOptions(epochs=1, batch_size=32, lr=1e-3)
    config = CAPTConfig(heads=4, hidden=64, views=0, training=quick)
    options = RunOptions(shots=1, seeds=(1,), base=base, rivals=("linear_adapter", "tip_adapter"), linear=quick)
    model, data = backbone("vit"), many_classes(n_classes)
    model.class_text_features(["warm up"])
    model.image_features(torch.zeros(1, 3, *model.image_hw))
    kind = base_type(base).config_type
    run = Run(few_shot_all(data), model, config, options, base_config=kind(views=0, training=quick))
    before = peak()
    run.evaluate(folder, run.fit(folder))
    print(sum(read_json(f"{folder}/run.json")["announced_memory"].values()), peak() - before)


if __name__ == "__main__":
    main()
