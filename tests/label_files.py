"""A small multi-label data set on disk: pictures of one to three coloured shapes, some rare; and a run on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from capt.data import load_multi_label
from capt.methods.cprfl_config import CPRFLConfig
from capt.methods.multi_label.model import LinearLabelsConfig
from capt.methods.multi_label.run import MultiLabelOptions, MultiLabelRun
from capt.training import TrainingOptions
from tests import tiny

#: Class, colour, and how many images of thirty show it; no test image shows the last one.
SHAPES = {
    "red bar": ((220, 40, 40), 20),
    "blue disc": ((40, 60, 220), 12),
    "green disc": ((30, 170, 60), 5),
    "black bar": ((20, 20, 20), 3),
    "gold square": ((220, 180, 40), 2),
}
IMAGES = {"train": 30, "val": 15, "test": 15}
HEAD, MEDIUM = 10, 4  # thresholds that suit these frequencies


def write_labels(folder: Path, seed: int = 0, splits: tuple[str, ...] = ("train", "val", "test")) -> Path:
    """Pictures and ``shapes.csv``, whose path is returned; the last image of each split shows nothing."""
    draw = np.random.default_rng(seed)
    lines = ["path,labels,split"]
    for split in splits:
        count = IMAGES[split]
        for number in range(count):
            shown = [
                name for place, (name, (_, often)) in enumerate(SHAPES.items())
                if number * 7 % count * 30 // count in range(4 * place, 4 * place + often)
                and number < count - 1 and not (split == "test" and name == "gold square")
            ]  # fmt: skip
            path = f"{split}-{number}.png"
            _picture(shown, draw).save(folder / path)
            lines.append(f"{path},{';'.join(shown)},{split}")
    table = folder / "shapes.csv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def _picture(shown: list[str], draw: np.random.Generator) -> Image.Image:
    picture = Image.new("RGB", (48, 48), (235, 235, 235))
    pen = ImageDraw.Draw(picture)
    for name in shown:
        left, top = draw.integers(0, 26, 2).tolist()
        box = (left, top, left + 20, top + (8 if name.endswith("bar") else 20))
        (pen.ellipse if name.endswith("disc") else pen.rectangle)(box, fill=SHAPES[name][0])
    pixels = np.asarray(picture) + draw.normal(0, 10, (48, 48, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_run(out: Path, table: Path, seeds: tuple[int, ...] = (1, 2), epochs: int = 2) -> Path:
    """A finished run of a linear classifier and CPRFL with a tiny model on the set of :func:`write_labels`."""
    training = TrainingOptions(epochs=epochs, batch_size=8, lr=3e-3, clip_norm=0.0)
    models = {
        "linear_bce": LinearLabelsConfig(loss="bce", training=training),
        "cprfl": CPRFLConfig(dim=16, n_heads=2, training=training),
    }
    options = MultiLabelOptions(seeds=seeds, head=HEAD, medium=MEDIUM)
    run = MultiLabelRun(load_multi_label(table), tiny.backbone(), models, options)
    run.evaluate(out, run.fit(out))
    return out
