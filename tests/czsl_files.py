"""Small trees laid out like MIT-States, UT-Zappos and C-GQA."""

from __future__ import annotations

from pathlib import Path

import torch

from capt.data.readers.czsl import METADATA
from tests.data_files import save

PAIRS = {
    "train": "red heart\nblue book\nblue coat\n",
    "val": "blue book\nred book\n",
    "test": "red heart\nblue heart\nred coat",
}
# image, state, object, set
RECORDS = [
    ("red_heart/1.png", "red", "heart", "train"),
    ("blue_book/1.png", "blue", "book", "train"),
    ("blue_coat/1.png", "blue", "coat", "train"),
    ("blue_book/2.png", "blue", "book", "val"),
    ("red_book/1.png", "red", "book", "val"),
    ("red_heart/2.png", "red", "heart", "test"),
    ("blue_heart/1.png", "blue", "heart", "test"),
    ("red_coat/1.png", "red", "coat", "extra"),  # neither train nor val: test
    ("red_book/2.png", "red", "book", "test"),  # its pair is in val's file alone; it stays a test image
    ("none/1.png", "NA", "heart", "train"),
    ("none/2.png", "red", "heart", "NA"),
    ("green_heart/1.png", "green", "heart", "train"),  # in no pair file
    ("red_heart/1.png", "red", "heart", "train"),  # repeated
]


def tree(root: Path, records=RECORDS, pairs=PAIRS, dataset: str = "mit-states", images: bool = True) -> Path:
    folder = root / dataset
    (folder / "compositional-split-natural").mkdir(parents=True)
    for split, text in pairs.items():
        (folder / "compositional-split-natural" / f"{split}_pairs.txt").write_text(text)
    keys = ("image", "attr", "obj", "set", "_image")
    torch.save([dict(zip(keys, record, strict=False)) for record in records], folder / METADATA)
    for number, (image, *_) in enumerate(records if images else ()):
        save(folder / "images" / image, number)
    return root
