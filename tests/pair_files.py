"""A small compositional data set on disk: coloured shapes, some pairs never trained on; and a run on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from capt.data import load_compositional
from capt.methods.compositional.csp import CSPConfig
from capt.methods.compositional.run import CompositionalOptions, CompositionalRun
from capt.methods.msci_config import MSCIConfig
from capt.training import TrainingOptions
from tests import tiny

STATES = {"blue": (40, 60, 220), "green": (30, 170, 60), "red": (220, 40, 40)}
OBJECTS = ("bar", "circle", "square")
#: Pairs without training images, by the split that shows them.
UNSEEN = {("blue", "square"): "val", ("green", "bar"): "test", ("red", "circle"): "test"}
SPLITS = {"train": 4, "val": 2, "test": 2}  # images a pair


def write_pairs(folder: Path, seed: int = 0) -> Path:
    """Pictures and ``shapes.csv``, whose path is returned; seen pairs are in all splits."""
    draw = np.random.default_rng(seed)
    lines = ["path,state,object,split"]
    for state, colour in STATES.items():
        for thing in OBJECTS:
            for split, count in SPLITS.items():
                if UNSEEN.get((state, thing), split) != split:
                    continue
                for number in range(count):
                    path = f"{state}-{thing}-{split}-{number}.png"
                    _picture(thing, colour, draw).save(folder / path)
                    lines.append(f"{path},{state},{thing},{split}")
    table = folder / "shapes.csv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def _picture(thing: str, colour: tuple[int, int, int], draw: np.random.Generator) -> Image.Image:
    picture = Image.new("RGB", (40, 40), (235, 235, 235))
    left, top = draw.integers(2, 10, 2).tolist()
    pen = ImageDraw.Draw(picture)
    if thing == "circle":
        pen.ellipse((left, top, left + 26, top + 26), fill=colour)
    else:
        pen.rectangle((left, top, left + 26, top + (26 if thing == "square" else 8)), fill=colour)
    pixels = np.asarray(picture) + draw.normal(0, 25, (40, 40, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_run(out: Path, table: Path, seeds: tuple[int, ...] = (1, 2), epochs: int = 2) -> Path:
    """A finished run of CSP and MSCI with a tiny model on the set of :func:`write_pairs`."""
    training = TrainingOptions(epochs=epochs, batch_size=8, optimizer="adam", lr=3e-3)
    models = {
        "csp": CSPConfig(training=training),
        "msci": MSCIConfig(n_low=1, n_high=1, n_heads=4, adapter_width=4, training=training),
    }
    data = load_compositional(table)
    run = CompositionalRun(data, tiny.backbone(), models, CompositionalOptions(seeds=seeds, n_thresholds=3))
    run.evaluate(out, run.fit(out, pairs=data.pairs.tolist()))
    return out
